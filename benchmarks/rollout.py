"""Rollouts by vLLM in the trainer's process: dialogues of three turns without barriers beside plain `LLM.generate`.

    ilr-fast bench rollout      # one NVIDIA GPU with vLLM; about three minutes

A model of Qwen2's 1.5B shape with random weights. Every dialogue has a prompt of 200 tokens and three turns of forced
length, log-normal with mean 200, at most 512, from a fixed seed; before the second and third turn it is given 60 tokens
more. The reference generates as many turns, each after a prompt of 200 tokens, in one call with the same settings and
slots, in the same process. Both give log-probs. Beside them: what an update costs until the engine has it, and what the
start takes.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ilr_benchmarks.common import row

from ilr_fast.errors import UserError
from ilr_fast.types import Sampling

TURNS, PROMPT, BETWEEN, MEAN, MOST = 3, 200, 60, 200, 512
BIG = dict(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
SMALL = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
TARGETS = {"dialogues": 1 / 0.95, "update": 0.05}


class NoText:
    """A tokenizer for generations that nobody reads."""

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool) -> str:
        return ""


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> list[dict[str, Any]]:
    """Rows of the rollout itself, the update and the start; a row with a status alone where vLLM is missing."""
    dialogues = 6 if quick else 512
    shape = f"{'small' if quick else 'Qwen2 1.5B'}, {dialogues} dialogues of {TURNS} turns"
    try:
        start = _started(quick, dialogues, device)
    except UserError as error:
        return [row("dialogues by the engine", shape, [], status=str(error).splitlines()[0])]
    engine, model, seconds = start
    g = np.random.default_rng(0)
    lengths = _lengths(g, dialogues, 12 if quick else MOST)
    prompts = g.integers(0, model.config.vocab_size, (dialogues, TURNS, PROMPT)).tolist()
    generated = int(lengths.sum())
    asyncio.run(_talk(engine, prompts, np.minimum(lengths, 8)))  # kernels are loaded and compiled
    times = min(rounds, 3)
    ours = [_timed(lambda: asyncio.run(_talk(engine, prompts, lengths)), engine) for _ in range(times)]
    busy = engine.stats()
    update = [_timed(lambda: _update(engine, model)) for _ in range(5)]
    plain = [] if only_ours else _plain(model, prompts, lengths, times, quick, device)
    rows = [row("plain LLM.generate, in one call", shape, plain, **_speed(plain, generated))] if plain else []
    limit = float(np.median(plain)) if plain else None
    told = _met(ours, limit)
    return [
        *rows,
        row(
            "dialogues by the engine",
            shape,
            ours,
            limit_seconds=limit,
            prefix_hits=busy.tokens_reused / busy.tokens_prompt,
            **_speed(ours, generated),
            **told,
        ),
        row(
            "an update until the engine has it",
            shape,
            update,
            target=f"≤ {TARGETS['update']} s",
            met=bool(np.median(update) <= TARGETS["update"]),
            bytes_copied=0 if engine.shares else None,
        ),
        *(row(f"start: {name}", shape, [value]) for name, value in seconds.items()),
    ]


def _started(quick: bool, dialogues: int, device: str) -> tuple[Any, Any, dict[str, float]]:
    """The engine on its model, and what the parts of the start took."""
    from ilr_fast.engines.vllm import VllmEngine
    from ilr_fast.engines.vllm_core import check_version, import_vllm

    check_version("bench")
    seconds: dict[str, float] = {}
    _part(seconds, "import", import_vllm)
    model = _part(seconds, "random weights of the trainer", lambda: _model(quick, device))
    options = _options(quick, dialogues)
    engine = _part(
        seconds,
        "engine (weights, profile, graphs, sharing)",
        lambda: VllmEngine(model, NoText(), options=options, seeded=False, where="bench"),
    )
    return engine, model, seconds


def _options(quick: bool, dialogues: int) -> Any:
    from ilr_fast.engines.vllm_core import CoreOptions

    return CoreOptions(slots=dialogues, max_context=4096, cache_gib=0.1 if quick else 22.0, fast_start=True)


def _model(quick: bool, device: str) -> Any:
    import transformers

    config = transformers.Qwen2Config(**(SMALL if quick else BIG))
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _lengths(g: np.random.Generator, dialogues: int, most: int) -> np.ndarray:
    """[dialogues, turns] tokens of a turn."""
    sigma = 0.6
    drawn = g.lognormal(np.log(MEAN) - sigma**2 / 2, sigma, (dialogues, TURNS))
    return np.clip(drawn, 1, most).astype(int)


async def _talk(engine: Any, prompts: list[list[list[int]]], lengths: np.ndarray) -> None:
    """All dialogues at once, each turn as soon as the one before it is there."""

    async def one(number: int) -> None:
        tokens = list(prompts[number][0])
        for turn in range(TURNS):
            result = await engine.generate(tokens, Sampling(int(lengths[number, turn]), seed=number))
            if len(result.tokens) != lengths[number, turn]:
                raise RuntimeError(f"a turn has {len(result.tokens)} tokens: {result.error}")
            tokens += [*result.tokens, *prompts[number][min(turn + 1, TURNS - 1)][:BETWEEN]]

    await asyncio.gather(*(one(n) for n in range(len(prompts))))


def _update(engine: Any, model: Any) -> None:
    """Every weight is written in place and the engine told."""
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.999)
    engine.weights_changed()


def _plain(
    model: Any, prompts: list[list[list[int]]], lengths: np.ndarray, times: int, quick: bool, device: str
) -> list[float]:
    """Seconds of vLLM by itself for as many turns and tokens."""
    from ilr_fast.engines.vllm_core import plain_llm

    with tempfile.TemporaryDirectory() as folder:
        llm, parameters = plain_llm(model, _options(quick, len(prompts)), folder, torch.device(device))
        inputs = [{"prompt_token_ids": prompt} for dialogue in prompts for prompt in dialogue]
        limits = [parameters(int(n)) for n in lengths.flatten()]
        llm.generate(inputs, [parameters(8)] * len(inputs), use_tqdm=False)
        found = []
        for _ in range(times):
            llm.reset_prefix_cache()
            found.append(_timed(lambda: llm.generate(inputs, limits, use_tqdm=False)))
    return found


def _timed(work: Callable[[], Any], engine: Any = None) -> float:
    if engine is not None:
        engine.weights_changed()  # without what the rounds before left in the cache
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _part(seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - start
    return result


def _speed(seconds: list[float], tokens: int) -> dict[str, float]:
    return {"tokens_per_second": tokens / float(np.median(seconds))}


def _met(ours: list[float], limit: float | None) -> dict[str, Any]:
    if limit is None:
        return {}
    return {"target": "≥ 0.95 of its tokens/s", "met": bool(np.median(ours) <= TARGETS["dialogues"] * limit)}
