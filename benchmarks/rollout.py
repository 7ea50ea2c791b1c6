"""Rollouts by vLLM in the trainer's process: dialogues of three turns without barriers beside plain `LLM.generate`.

    ilr-fast bench rollout      # one NVIDIA GPU with vLLM; two minutes a round

Models with random weights, of Qwen2's 1.5B and Llama 3.2's 1B shape. Every dialogue has a prompt of 200 tokens and
three turns of forced length, log-normal with mean 200, at most 512, from a fixed seed; before the second and third turn
it is given 60 tokens more. 512 of 1,024 dialogues are in flight. Beside them, in the same process with the same slots:

- plain `LLM.generate` of as many turns and tokens, each after a prompt of 200 tokens, in one call;
- the same dialogues stage by stage in batches of 512, with a barrier after each stage;
- what an update costs until the engine has it, what the start takes, what the weights take beside the trainer's;
- the GPU's idle share over some steps, from the times of all kernels;
- two agents of both shapes in one process, 256 dialogues each at the same time, and one agent after the other.

All give log-probs; those of some sequences are held against the trainer's own forward pass. Rows come as they are made.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from ilr_benchmarks.common import row
from ilr_benchmarks.rollout_load import TURNS, Load, NoText, in_stages, random_model, talk

from ilr_fast.errors import UserError
from ilr_fast.types import Generation, Sampling

TARGETS = {"plain": 0.95, "stages": 1.3, "agents": 1.1, "update": 0.05, "start": 25.0, "idle": 0.1}
GIB = 2**30


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows, the most important ones first; a row with a status alone where vLLM is missing."""
    rounds = min(rounds, 3)
    in_flight = 6 if quick else 512
    shape = f"{'small' if quick else 'Qwen2 1.5B'}, {2 * in_flight} dialogues of {TURNS} turns, {in_flight} in flight"
    seconds: dict[str, float] = {}
    try:
        engine, model = _started(seconds, "qwen", in_flight, quick, device)
    except UserError as error:
        yield row("dialogues by the engine", shape, [], status=str(error).splitlines()[0])
        return
    load = Load.drawn(model.config.vocab_size, 2 * in_flight, in_flight, 12 if quick else 512)
    error = _error(engine, model)
    asyncio.run(talk(engine, load.cut(in_flight, 8)))  # kernels are loaded and compiled
    ours, idle, hits = [], [], []
    for _ in range(rounds):
        before = engine.stats()
        ours.append(_timed(lambda: asyncio.run(talk(engine, load)), engine))
        after = engine.stats()
        hits.append((after.tokens_reused - before.tokens_reused) / (after.tokens_prompt - before.tokens_prompt))
    more = dict(error=error, prefix_hits=float(np.median(hits)), **_speed(ours, load.generated))
    yield row("dialogues by the engine", shape, ours, **more)
    yield from _weights(engine, model, shape)
    yield from _start(seconds, shape)
    if device == "cuda":
        idle = [_idle_share(engine, load) for _ in range(min(rounds, 2))]
        met = bool(np.median(idle) <= TARGETS["idle"])
        yield row(
            "idle share of the GPU while dialogues run",
            shape,
            [],
            share=float(np.median(idle)),
            met=met,
            target=f"≤ {TARGETS['idle']}",
            status=f"{np.median(idle):.3f}",
        )
    if only_ours:
        return
    plain = _plain(model, load, rounds, quick, device)
    yield row("plain LLM.generate, in one call", shape, plain, **_speed(plain, load.generated))
    yield _ratio("dialogues beside plain LLM.generate", shape, plain, ours, TARGETS["plain"])
    stages = [_timed(lambda: asyncio.run(in_stages(engine, load)), engine) for _ in range(rounds)]
    yield row("stage by stage, with barriers", shape, stages, **_speed(stages, load.generated))
    yield _ratio("dialogues beside stages with barriers", shape, stages, ours, TARGETS["stages"])
    yield from _two_agents(engine, model, load.cut(in_flight // 2), rounds, quick, device)


def _started(seconds: dict[str, float], family: str, slots: int, quick: bool, device: str) -> tuple[Any, Any]:
    """The engine on its model, and what the parts of the start took."""
    from ilr_fast.engines.vllm import VllmEngine
    from ilr_fast.engines.vllm_core import check_version
    from ilr_fast.engines.vllm_process import import_vllm

    check_version("bench")
    _part(seconds, "importing vLLM", import_vllm)
    model = _part(seconds, "random weights of the trainer", lambda: random_model(family, device, quick))
    options = _options(quick, slots)
    engine = _part(
        seconds,
        "the engine",
        lambda: VllmEngine(model, NoText(), options=options, seeded=False, where="bench"),
    )
    return engine, model


def _options(quick: bool, slots: int) -> Any:
    from ilr_fast.engines.vllm_core import CoreOptions

    return CoreOptions(slots=slots, max_context=4096, cache_gib=0.1 if quick else slots * 22 / 512)


def _start(seconds: dict[str, float], shape: str) -> Iterator[dict[str, Any]]:
    total = sum(seconds.values()) - seconds["random weights of the trainer"]
    met = bool(total <= TARGETS["start"])
    yield row("start: importing vLLM and the engine", shape, [total], target=f"≤ {TARGETS['start']:g} s", met=met)
    for name, value in seconds.items():
        yield row(f"start: {name}", shape, [value])


def _weights(engine: Any, model: Any, shape: str) -> Iterator[dict[str, Any]]:
    """An update of every weight until the engine has it, and the memory of both models' weights beyond one copy."""
    update = [_timed(lambda: _update(engine, model)) for _ in range(5)]
    met = bool(np.median(update) <= TARGETS["update"])
    copied = 0 if engine.shares else sum(p.nbytes for p in model.parameters())
    yield row(
        "an update until the engine has it",
        shape,
        update,
        target=f"≤ {TARGETS['update']} s",
        met=met,
        extra_gib=engine.extra_weight_bytes() / GIB,
        bytes_copied=copied,
    )


def _error(engine: Any, model: Any) -> float:
    """Mean |Δ log-prob| between the engine and the trainer's forward pass, over 8 sequences of 32 sampled tokens."""
    g = np.random.default_rng(1)
    prompts = g.integers(0, model.config.vocab_size, (8, 40)).tolist()

    async def sampled() -> list[Generation]:
        return list(await asyncio.gather(*(engine.generate(p, Sampling(32, seed=n)) for n, p in enumerate(prompts))))

    results = asyncio.run(sampled())
    tokens = torch.tensor([[*p, *r.tokens] for p, r in zip(prompts, results, strict=True)], device=model.device)
    with torch.inference_mode():
        logits = model(tokens).logits[:, 39:-1].float()
        logps = logits.log_softmax(-1).gather(-1, tokens[:, 40:, None])[..., 0]
    return float((logps - torch.tensor([r.logps for r in results], device=model.device)).abs().mean())


def _idle_share(engine: Any, load: Load, steps: int = 60) -> float:
    """Of the time of some steps with all slots in use, the share in which no kernel and no copy ran on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    engine.weights_changed()

    async def some_steps() -> Any:
        task = asyncio.create_task(talk(engine, load))
        await _steps(engine, 150)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            await _steps(engine, steps)
            torch.cuda.synchronize()
        task.cancel()
        return seen.profiler.kineto_results.events()

    try:
        events = asyncio.run(some_steps())
    except asyncio.CancelledError:  # the dialogues were
        return float("nan")
    spans = sorted(
        (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in events
        if e.device_type() == torch.autograd.DeviceType.CUDA
    )
    busy, end = 0, spans[0][0]
    for first, last in spans:
        busy += max(0, last - max(first, end))
        end = max(end, last)
    return 1 - busy / (end - spans[0][0])


async def _steps(engine: Any, number: int) -> None:
    goal = engine.stats().steps + number
    while engine.stats().steps < goal:
        await asyncio.sleep(0)


def _update(engine: Any, model: Any) -> None:
    """Every weight is written in place and the engine told."""
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.999)
    engine.weights_changed()


def _plain(model: Any, load: Load, times: int, quick: bool, device: str) -> list[float]:
    """Seconds of vLLM by itself for as many turns and tokens."""
    from ilr_fast.engines.vllm_core import plain_llm

    with tempfile.TemporaryDirectory() as folder:
        llm, parameters = plain_llm(model, _options(quick, load.in_flight), folder, torch.device(device))
        inputs = [{"prompt_token_ids": prompt} for dialogue in load.prompts for prompt in dialogue]
        limits = [parameters(int(n)) for n in load.lengths.flatten()]
        llm.generate(inputs[: load.in_flight], [parameters(8)] * load.in_flight, use_tqdm=False)
        found = []
        for _ in range(times):
            llm.reset_prefix_cache()
            found.append(_timed(lambda: llm.generate(inputs, limits, use_tqdm=False)))
    return found


def _two_agents(engine: Any, model: Any, load: Load, rounds: int, quick: bool, device: str) -> Iterator[dict[str, Any]]:
    """Two engines of one process on one GPU, driven by one event loop: together, and one after the other."""
    shape = f"Qwen2 1.5B and Llama 1B, {len(load.prompts)} dialogues of {TURNS} turns each"
    seconds: dict[str, float] = {}
    other, other_model = _started(seconds, "llama", load.in_flight, quick, device)
    vocabulary = other_model.config.vocab_size
    loads = {engine: load, other: Load.drawn(vocabulary, len(load.prompts), load.in_flight, 12 if quick else 512)}
    asyncio.run(talk(other, loads[other].cut(load.in_flight, 8)))

    async def together() -> None:
        await asyncio.gather(*(talk(one, work) for one, work in loads.items()))

    def in_turn() -> None:
        for one, work in loads.items():
            asyncio.run(talk(one, work))

    def fresh() -> None:
        for one in loads:
            one.weights_changed()

    alone, both = [], []
    for _ in range(rounds):
        fresh()
        alone.append(_timed(in_turn))
        fresh()
        both.append(_timed(lambda: asyncio.run(together())))
    tokens = sum(work.generated for work in loads.values())
    errors = max(_error(engine, model), _error(other, other_model))
    yield row("one agent after the other", shape, alone, **_speed(alone, tokens))
    yield row("both at the same time", shape, both, error=errors, **_speed(both, tokens))
    yield _ratio("both beside one after the other", shape, alone, both, TARGETS["agents"])
    yield row("start: a second engine", shape, [seconds["the engine"]])


def _ratio(variant: str, shape: str, theirs: list[float], ours: list[float], target: float) -> dict[str, Any]:
    """Tokens/s of `ours` over those of `theirs`, for the same tokens."""
    ratio = float(np.median(theirs) / np.median(ours))
    return row(
        variant,
        shape,
        ours,
        limit_seconds=float(np.median(theirs)),
        ratio=ratio,
        met=ratio >= target,
        target=f"{ratio:.3f} × its tokens/s, wanted ≥ {target:g}",
    )


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
