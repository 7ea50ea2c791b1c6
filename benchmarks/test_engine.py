"""The embedded engine against transformers' own generators, on the CPU (or the GPU, where there is one).

Two loads, on SmolLM2-135M's shape with random weights (speed does not depend on their values; lengths are forced):

- `sums`: 8 questions × 8 samples of 12 tokens after a prompt of 14;
- `dialogues`: 16 dialogues of three stages, 4 samples a question, turn lengths log-normal with mean 24 and at most 96,
  30 and 20 tokens appended between the turns; all at once (batch 16), and through 4 slots (batch 4). `generate` is
  called per stage and batch, on left-padded conversations, and runs to the batch's longest turn.

Variants run interleaved in one process; before any time is taken, the engine's log-probs are held against an ordinary
forward pass (`error`). `limit_ms` is the time of the matrix products alone, each distinct token once, at 64 rows.
`cpu_seconds` is the process's own time, which other work on the machine moves less than the clock's.

    OMP_NUM_THREADS=2 pytest benchmarks/test_engine.py      # writes benchmarks/results/engine_cpu.json
    ILR_BENCH_REPEATS=1 OMP_NUM_THREADS=1 pytest benchmarks/test_engine.py      # on a machine that others use
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig

sys.path.insert(0, str(Path(__file__).parent))
from common import row, write_results

from ilr_fast.attention import prepare
from ilr_fast.engines.embedded import EmbeddedEngine
from ilr_fast.types import Generation, Sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 49152
APPENDED = (0, 30, 20)
REPEATS = int(os.environ.get("ILR_BENCH_REPEATS", 3))


class _NoText:
    """The loads have no stop strings, and nobody reads the texts."""

    def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool) -> str:
        return ""


def smollm2_shape() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(DEVICE).eval()


class Load:
    """Dialogues: first prompts (equal within a question), the appended tokens and the forced lengths, by stage."""

    def __init__(self, questions: int, samples: int, prompt: int, lengths_DS: np.ndarray, batch: int):
        g = np.random.default_rng(1)
        draw = lambda n: g.integers(0, VOCABULARY, n).tolist()  # noqa: E731
        prompts = [draw(prompt) for _ in range(questions)]
        self.lengths_DS, self.batch = lengths_DS, batch
        stages = lengths_DS.shape[1]
        self.appended_DS = [
            [prompts[d // samples] if s == 0 else draw(APPENDED[s]) for s in range(stages)]
            for d in range(questions * samples)
        ]
        self.tokens = int(lengths_DS.sum())


def sums() -> Load:
    return Load(8, 8, 14, np.full((64, 1), 12), 64)


def dialogues(batch: int) -> Load:
    g = np.random.default_rng(0)
    lengths_DS = np.clip(g.lognormal(np.log(24) - 0.5 * 0.6**2, 0.6, (16, 3)).round(), 1, 96).astype(int)
    return Load(4, 4, 40, lengths_DS, batch)


def run_engine(model: transformers.PreTrainedModel, load: Load) -> list[list[int]]:
    engine = EmbeddedEngine(model, _NoText(), slots=load.batch)

    async def dialogue(d: int) -> tuple[list[int], list[Generation]]:
        tokens: list[int] = []
        turns = []
        for s, length in enumerate(load.lengths_DS[d].tolist()):
            tokens += load.appended_DS[d][s]
            turns.append(await engine.generate(tokens, Sampling(length, seed=1000 * d + s)))
            tokens += turns[-1].tokens
        return tokens, turns

    async def every() -> list[tuple[list[int], list[Generation]]]:
        return list(await asyncio.gather(*(dialogue(d) for d in range(len(load.appended_DS)))))

    finished = asyncio.run(every())
    assert engine.stats().tokens_generated == load.tokens
    run_engine.turns = [turns for _, turns in finished]  # type: ignore[attr-defined]
    return [tokens for tokens, _ in finished]


def by_stage(load: Load, generate: Callable[[list[list[int]], list[int]], list[list[int]]]) -> list[list[int]]:
    """Runs the dialogues stage by stage, batch by batch."""
    tokens_D: list[list[int]] = [[] for _ in load.appended_DS]
    for s in range(load.lengths_DS.shape[1]):
        for start in range(0, len(tokens_D), load.batch):
            part = range(start, min(start + load.batch, len(tokens_D)))
            for d in part:
                tokens_D[d] = tokens_D[d] + load.appended_DS[d][s]
            lengths = [int(load.lengths_DS[d, s]) for d in part]
            for d, length, new in zip(part, lengths, generate([tokens_D[d] for d in part], lengths), strict=True):
                tokens_D[d] = tokens_D[d] + new[:length]
    assert sum(map(len, tokens_D)) == load.tokens + sum(len(a) for row in load.appended_DS for a in row)
    return tokens_D


def run_generate(model: transformers.PreTrainedModel, load: Load) -> list[list[int]]:
    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=DEVICE)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=max(lengths), pad_token_id=0
            )
        return out[:, width:].tolist()

    return by_stage(load, generate)


def run_generate_batch(model: transformers.PreTrainedModel, load: Load) -> list[list[int]]:
    blocks = -(-load.batch * 512 // 64)
    batching = ContinuousBatchingConfig(page_size=64, num_blocks=blocks, max_batch_tokens=1024, return_logprobs=True)

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        config = transformers.GenerationConfig(
            max_new_tokens=max(lengths), do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0
        )
        out = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        return [out[f"req_{n}"].generated_tokens for n in range(len(prompts))]

    return by_stage(load, generate)


def logp_error(model: transformers.PreTrainedModel, tokens_D: list[list[int]], load: Load) -> float:
    """The greatest difference of the engine's log-probs from an ordinary forward pass, over the first dialogues."""
    worst = 0.0
    for d, turns in list(enumerate(run_engine.turns))[:4]:  # type: ignore[attr-defined]
        with torch.inference_mode():
            logps_TV = model(torch.tensor([tokens_D[d]], device=DEVICE)).logits[0].float().log_softmax(-1).cpu()
        end = 0
        for s, turn in enumerate(turns):
            start = end + len(load.appended_DS[d][s])
            end = start + len(turn.tokens)
            expected = logps_TV[range(start - 1, end - 1), list(turn.tokens)]
            worst = max(worst, float((expected - torch.tensor(turn.logps)).abs().max()))
    return worst


def products_seconds(model: transformers.PreTrainedModel, tokens: int) -> float:
    """The model's matrix products for `tokens` tokens, 64 rows at a time, the LM head included."""
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    with torch.inference_mode():
        inputs = {w.shape[1]: torch.randn(64, w.shape[1], device=DEVICE) for w in weights}
        times = []
        for _ in range(4):
            start = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return min(times) * tokens / 64


VARIANTS = {"embedded": run_engine, "generate": run_generate, "generate_batch": run_generate_batch}
LOADS = {"sums 64x12": sums, "dialogues batch 16": lambda: dialogues(16), "dialogues batch 4": lambda: dialogues(4)}


def measure(model: transformers.PreTrainedModel, name: str, load: Load, variants: Sequence[str]) -> list[dict]:
    tokens_D = run_engine(model, load)
    error = logp_error(model, tokens_D, load)
    assert error < (1e-3 if model.dtype == torch.float32 else 0.5), f"log-probs differ by {error}: no times"
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    cpu_seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(REPEATS):
        for variant in variants:
            # The peers run as they come: with transformers' own SDPA, not with the packed attention.
            prepare(model) if variant == "embedded" else model.set_attn_implementation("sdpa")
            start, cpu_start = time.perf_counter(), time.process_time()
            VARIANTS[variant](model, load)
            seconds[variant].append(time.perf_counter() - start)
            cpu_seconds[variant].append(time.process_time() - cpu_start)
    prompts = len({tuple(a) for row in load.appended_DS for a in row[:1]}) * len(load.appended_DS[0][0])
    appended = sum(len(a) for row in load.appended_DS for a in row[1:])
    limit = products_seconds(model, load.tokens + prompts + appended)
    rows = []
    for variant in variants:
        rate = load.tokens / float(np.median(seconds[variant]))
        against = _ratio(seconds["generate"], seconds[variant])
        against_cpu = _ratio(cpu_seconds["generate"], cpu_seconds[variant])
        rows.append(
            row(
                variant,
                f"{name}: {load.tokens} tokens",
                seconds[variant],
                error=error if variant == "embedded" else None,
                limit_seconds=limit,
                cpu_seconds=float(np.median(cpu_seconds[variant])),
                tokens_per_second=rate,
                times_generate=against,
                times_generate_cpu=against_cpu,
            )
        )
        print(f"{name:20} {variant:15} {rate:7.0f} tokens/s {against:5.2f} x generate ({against_cpu:.2f} by CPU time)")
    return rows


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """The median over the rounds, in each of which the variants ran one after the other."""
    return float(np.median(np.array(theirs) / np.array(ours)))


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return smollm2_shape()


def test_engine_against_transformers(model: transformers.PreTrainedModel) -> None:
    transformers.logging.set_verbosity_error()
    rows = []
    for name, load in LOADS.items():
        variants = ["embedded", "generate"] + (["generate_batch"] if name.startswith("sums") else [])
        rows += measure(model, name, load(), variants)
        write_results(
            f"engine_{'gpu' if DEVICE == 'cuda' else 'cpu'}",
            rows,
            f"OMP_NUM_THREADS={torch.get_num_threads()} pytest benchmarks/test_engine.py",
        )
