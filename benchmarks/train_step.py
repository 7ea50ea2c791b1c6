"""The training part of a step: sequences with advantages in, updated weights out, on one GPU.

    ilr-fast bench train_step        # one NVIDIA GPU, about two minutes

A model of Qwen2's 1.5B shape with random weights, all of it trained by AdamW in place on bfloat16 (β = 0, on-policy
with importance weights); 32 questions of 81 tokens × 16 samples of 512 tokens, or of log-normal lengths (mean 300, at
most 2,048). A row's `mfu` counts 6 operations for each weight of the layers and distinct token, for each weight of the
LM head and trained token, and 12 for each query-key pair, head and dimension; neither recomputed work nor a prompt that
stands several times counts. The peak is a product of 8,192 cubed in bfloat16 in the same run. `error` compares the norm
of the gradient with that of the same sequences one by one, at the same weights; tests/test_train_gpu.py compares
gradients with transformers' own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from ilr_benchmarks.common import row
from ilr_benchmarks.deterministic import deterministic_row
from ilr_benchmarks.first_times import FirstTimes
from torch import Tensor

from ilr_fast.agent import Agent
from ilr_fast.allocator import grow_segments
from ilr_fast.config import AgentConfig, Config, LossConfig, OptimizerConfig
from ilr_fast.loading import for_training
from ilr_fast.tree_plan import pack_sequences
from ilr_fast.types import TrainingSequence, TrainingTurn

QUESTIONS, SAMPLES, PROMPT, FORCED = 32, 16, 81, 512
MEAN, MOST = 300, 2048
BIG = dict(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
)  # fmt: skip
SMALL = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
TARGET_SECONDS, TARGET_MFU, TARGET_RAGGED = 7.0, 0.45, 1.05


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows of forced and ragged lengths, with prefixes shared and not, and with deterministic kernels."""
    questions, samples, forced = (3, 4, 12) if quick else (QUESTIONS, SAMPLES, FORCED)
    number = questions * samples
    even = sequences(np.full(number, forced), samples, quick)
    fresh = [sequences(ragged(number, quick, seed), samples, quick, seed) for seed in range(2, 5 + rounds)]
    bench = Bench(quick, device, min(rounds, 3))
    error = bench.sharing_error(even[: 2 * samples])
    base = bench.measure("forced", even, share=True) | {"error": error}
    met = base["ms"] <= 1e3 * TARGET_SECONDS and (base["mfu"] or 0) >= TARGET_MFU
    yield base | {"target": f"≤ {TARGET_SECONDS} s, MFU ≥ {TARGET_MFU}", "met": met}
    yield beside(base, bench.fresh(fresh), TARGET_RAGGED)
    repeated = bench.measure("ragged", sequences(ragged(number, quick), samples, quick), share=True)
    yield beside(base, repeated | {"error": error}, TARGET_RAGGED)
    yield bench.measure("forced", even, share=False)
    yield beside(base, deterministic_row(bench, even[: number // 2]))
    if device == "cuda":
        yield bench.profile(even[: 3 * samples])


def beside(base: dict[str, Any], row: dict[str, Any], target: float | None = None) -> dict[str, Any]:
    """A row with its time a token beside the forced run's, and the target for that."""
    ratio = row["us_per_token"] / base["us_per_token"]
    judged = {"target": f"{ratio:.3f} of the forced run's time a token", "met": None}
    if target is not None:
        judged = {"target": f"{judged['target']}, wanted ≤ {target}", "met": ratio <= target}
    return row | judged | {"of_forced": ratio}


class Bench:
    """One agent, whose update is timed with different sequences."""

    def __init__(self, quick: bool, device: str, rounds: int, micro_batch_tokens: int = 4096, **keys: Any):
        grow_segments()  # as a run does
        self.device, self.rounds, self.steps = device, rounds, 0
        self.agent = make_agent(SMALL if quick else BIG, device, micro_batch_tokens=micro_batch_tokens, **keys)
        self.peak = None if device == "cpu" else peak_of_products()

    def measure(self, load: str, given: Sequence[TrainingSequence], share: bool) -> dict[str, Any]:
        """One row; the first step with these sequences is told apart, since libraries load kernels for new lengths."""
        self.agent.rules = replace(self.agent.rules, share_prefixes=share)
        first, _ = self._step(given)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        norm, seconds = 0.0, []
        for _ in range(self.rounds):
            taken, norm = self._step(given)
            seconds.append(taken)
        start = time.perf_counter()
        batches = self.agent._pack(given, self.agent.guard.tokens).batches
        packing = time.perf_counter() - start
        sizes = [len(batch.tokens_T) for batch in batches]
        distinct, operations = work(self.agent.model.config, given)
        tokens = sum(len(s.tokens) for s in given)
        median = float(np.median(seconds))
        return row(
            f"ilr-fast, {load}" + ("" if share else ", prefixes not shared"),
            f"Qwen2 {count(self.agent.model) / 1e9:.2g}B, {len(given)} sequences, {tokens} tokens",
            seconds,
            limit_seconds=operations / self.peak if self.peak else None,
            first_ms=1e3 * first,
            mfu=operations / median / self.peak if self.peak else None,
            peak_tflops=self.peak and self.peak / 1e12,
            us_per_token=1e6 * median / distinct,
            tokens_per_second=tokens / median,
            micro_batches=len(sizes),
            rows=sum(sizes),
            fullest=max(sizes),
            packing_ms=1e3 * packing,
            grad_norm=norm,
            **memory(self.device),
        )

    def fresh(self, loads: Sequence[Sequence[TrainingSequence]]) -> dict[str, Any]:
        """One row for steps that each have lengths of their own, as in training: the median a token, and every step."""
        self.agent.rules = replace(self.agent.rules, share_prefixes=True)
        steps = []
        for given in loads:
            with FirstTimes() as seen:
                seconds, _ = self._step(given)
            distinct = work(self.agent.model.config, given)[0]
            steps.append({"seconds": seconds, "us_per_token": 1e6 * seconds / distinct, **seen.as_dict()})
        return row(
            "ilr-fast, ragged, new lengths in every step",
            f"Qwen2 {count(self.agent.model) / 1e9:.2g}B, {len(loads[0])} sequences, {len(loads)} steps",
            [step["seconds"] for step in steps],
            us_per_token=float(np.median([step["us_per_token"] for step in steps])),
            steps=steps,
            **memory(self.device),
        )

    def sharing_error(self, given: Sequence[TrainingSequence]) -> float:
        """How far the gradient's norm with shared prefixes is from that without, at the same weights, relative."""
        optimizer, norms = self.agent.optimizer, []
        assert optimizer is not None
        kept, optimizer.config = optimizer.config, replace(optimizer.config, lr=0.0)
        for share in (True, False):
            self.agent.rules = replace(self.agent.rules, share_prefixes=share)
            norms.append(self._step(given)[1])
        optimizer.config = kept
        return abs(norms[0] / norms[1] - 1)

    def _step(self, given: Sequence[TrainingSequence]) -> tuple[float, float]:
        """Seconds and gradient norm of one update."""
        self.steps += 1
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = self.agent.update(given, self.steps)
        if self.device == "cuda":
            torch.cuda.synchronize()
        norm = result.metrics["grad_norm"]
        assert norm is not None, "no update was made"
        return time.perf_counter() - start, norm

    def profile(self, given: Sequence[TrainingSequence]) -> dict[str, Any]:
        """Where a GPU's time goes in an update on a few groups: kernels by time, the share of products, gaps."""
        self.agent.rules = replace(self.agent.rules, share_prefixes=True)
        self._step(given)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            seconds, _ = self._step(given)
        kernels = [(e.key, e.self_device_time_total / 1e3, e.count) for e in trace.key_averages()]
        kernels.sort(key=lambda kernel: -kernel[1])
        busy = sum(ms for _, ms, _ in kernels)
        products = sum(ms for name, ms, _ in kernels if is_product(name))
        top = [{"kernel": name[:90], "ms": round(ms, 2), "calls": calls} for name, ms, calls in kernels[:25]]
        return row("profile", f"{len(given)} sequences", [seconds], busy_share=busy / 1e3 / seconds,
                   product_share=products / busy, kernels=top)  # fmt: skip


def is_product(kernel: str) -> bool:
    """Whether a kernel's name is that of a matrix product, attention not counted."""
    return any(word in kernel for word in ("gemm", "nvjet", "cutlass", "product_kernel", "cublas"))


def make_agent(shape: dict[str, Any], device: str, **keys: Any) -> Agent:
    """An agent with random weights, made where they stay."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**shape), dtype=dtype)
    optimizer = OptimizerConfig(lr=1e-6, rounding="stochastic", moments="bfloat16")
    agent = AgentConfig(model="random", device=device, optimizer=optimizer, **keys)
    run = Config(agents={"ada": agent}, loss=LossConfig(importance="token"), steps=1000)
    return Agent("ada", agent, run, tokenizer=object(), model=for_training(model, agent, "agents.ada", 0))


def sequences(lengths: np.ndarray, samples: int, quick: bool, seed: int = 0) -> list[TrainingSequence]:
    """One sequence for each length of its answer; groups of `samples` share a prompt of PROMPT tokens."""
    g, vocabulary = np.random.default_rng(seed), SMALL["vocab_size"] if quick else BIG["vocab_size"]
    questions = g.integers(0, vocabulary, (len(lengths) // samples, PROMPT)).tolist()
    found = []
    for i, length in enumerate(lengths.tolist()):
        prompt, answer = questions[i // samples], g.integers(0, vocabulary, length).tolist()
        turn = TrainingTurn(PROMPT, PROMPT + length, float(g.normal()), (-12.0,) * length)
        found.append(TrainingSequence(f"q{i // samples}", i % samples, tuple(prompt + answer), (turn,)))
    return found


def ragged(number: int, quick: bool, seed: int = 1) -> np.ndarray:
    """Log-normal lengths of mean MEAN and at most MOST."""
    drawn = np.random.default_rng(seed).lognormal(0, 0.8, number)
    mean, most = (12, 40) if quick else (MEAN, MOST)
    return np.clip(drawn / drawn.mean() * mean, 1, most).astype(int)


def work(config: Any, given: Sequence[TrainingSequence]) -> tuple[int, float]:
    """Distinct tokens, and the operations that cannot be left out: see the module's docstring."""
    packed = pack_sequences([s.tokens[: s.turns[-1].end - 1] for s in given])
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    layer = 2 * hidden * size * (heads + config.num_key_value_heads) + 3 * hidden * config.intermediate_size
    trained = sum(t.end - t.start for s in given for t in s.turns)
    pairs = float((packed.plan.positions_T + 1).sum())
    products = 6.0 * (config.num_hidden_layers * layer * len(packed.tokens_T) + config.vocab_size * hidden * trained)
    return len(packed.tokens_T), products + 12.0 * config.num_hidden_layers * heads * size * pairs


def peak_of_products() -> float:
    """Operations a second of a large bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(a, b, out=out)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192.0**3 / float(np.median(times[10:]))


def memory(device: str) -> dict[str, float | None]:
    """GiB: the peak of what PyTorch has allocated and reserved, and what the whole card's processes hold now."""
    if device != "cuda":
        return {"allocated_gib": None, "reserved_gib": None, "card_gib": None}
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free
    return dict(zip(("allocated_gib", "reserved_gib", "card_gib"), (b / 2**30 for b in held), strict=True))


def count(model: torch.nn.Module) -> int:
    """Numbers in the model's weights, tied ones once."""
    parameters: list[Tensor] = list(model.parameters())
    return sum(p.numel() for p in parameters)
