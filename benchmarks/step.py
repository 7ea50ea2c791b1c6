"""A whole GRPO step, from prompts to updated weights, on one GPU, beside TRL's.

    ilr-fast bench step        # one NVIDIA GPU with vLLM, and TRL 1.16 for its rows; about six minutes

The training loop itself (`step_case.py`) on Qwen2's 1.5B shape with random weights: 32 questions of 81 tokens × 16
samples of 512 tokens, all weights trained by AdamW in place, β = 0, TRL's importance correction (by sequence, masked
above 3), vLLM in the process on the same weights. Rows:

    GRPO, 512 tokens each      a step of steady state, its parts, MFU of its training part, the card's memory by NVML
    GRPO, ragged lengths       log-normal, mean 300, at most 2,048, others in every step; time a token, tokens a slot
    overhead                   what is neither generation nor training, as a share of the step
    TRL                        the same work by GRPOTrainer with the best of some settings (`trl_step.py`)

MFU counts what `train_step.work` does. Every run is a process of its own; rows come as they are made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from ilr_benchmarks.common import row
from ilr_benchmarks.step_runs import FULL, QWEN, SMALL, Lines, asked, failed, memory, overhead, parts, run_case, total
from ilr_benchmarks.trl_step import trl_rows

SECONDS, MFU, MEMORY, OVERHEAD, RAGGED, PACKED, TRL = 15.0, 0.45, 24.0, 0.03, 1.05, 0.97, 2.0  # targets
CACHE_GIB = 8.75  # 512 sequences of 593 tokens take 8.1


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """The rows; a run that fails has a row that says how."""
    rounds = min(rounds, 3)
    load = SMALL if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        kinds = ["forced", "ragged"] * (1 + rounds)
        context = 512 if quick else 2304
        told = asked({"ada": QWEN}, kinds, load, f"{folder}/grpo", device, quick=quick, context=context,
                     cache_gib=CACHE_GIB)  # fmt: skip
        ours = run_case("step_case", told)
        yield from _grpo(ours, load)
        if not only_ours:
            yield from _trl(ours, load, quick)


def _shape(load: Mapping[str, int]) -> str:
    return f"Qwen2 1.5B, {load['questions']} questions × {load['samples']} samples"


def _grpo(lines: Lines, load: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Rows of our own run."""
    shape = _shape(load)
    if what := failed(lines):
        yield row("GRPO", shape, [], status=f"wrong: {what}")
        return
    end = lines[-1]["end"]
    steps = [{**line, "work": end["operations"][line["step"] - 1]["ada"]} for line in lines if "step" in line]
    forced, ragged = ([s for s in steps if s["kind"] == kind] for kind in ("forced", "ragged"))
    (first, *steady), (new, *ragged), peak = forced, ragged, end["peak"]  # the first two load and compile kernels
    seconds, most = [total(s) for s in steady], memory(steps)
    mfu = median(s["work"]["operations"] / s["seconds"]["train"] for s in steady) / peak if peak else None
    yield row(
        f"GRPO, {load['forced']} tokens each", shape, seconds, first_ms=1e3 * total(first), mfu=mfu,
        peak_tflops=peak and peak / 1e12, memory_gib=most, **parts(steady),
        met=median(seconds) <= SECONDS, target=f"≤ {SECONDS:g} s",
    )  # fmt: skip
    yield row("GRPO: training part", shape, [s["seconds"]["train"] for s in steady], mfu=mfu,
              met=None if mfu is None else mfu >= MFU, target=f"MFU {mfu or 0:.3f}, wanted ≥ {MFU}")  # fmt: skip
    yield row("GRPO: memory of the card (NVML)", shape, [], memory_gib=most,
              met=None if most is None else most <= MEMORY,
              target=f"{most or 0:.1f} GiB, wanted ≤ {MEMORY:g}")  # fmt: skip
    share = median(overhead(s) / total(s) for s in steady)
    yield row("GRPO: neither generation nor training", shape, [overhead(s) for s in steady], share=share,
              met=share <= OVERHEAD, target=f"{share:.4f} of the step, wanted ≤ {OVERHEAD:g}")  # fmt: skip
    of_forced = median(map(_a_token, ragged)) / median(map(_a_token, steady))
    # A micro-batch's slots are as many as the fullest one's; without padding all that are computed hold a token.
    packed = median(s["rows"] / (s["micro_batches"] * s["fullest"]) for s in ragged)
    yield row(
        f"GRPO, ragged lengths (mean {load['mean']}), new in every step", shape, [total(s) for s in ragged],
        first_ms=1e3 * total(new), us_per_token=[_a_token(s) for s in ragged], of_forced=of_forced, packed=packed,
        **parts(ragged),
        met=of_forced <= RAGGED and packed >= PACKED,
        target=f"training {of_forced:.3f} of forced a token, packed {packed:.3f}; wanted ≤ {RAGGED}, ≥ {PACKED}",
    )  # fmt: skip


def _a_token(step: Mapping[str, Any]) -> float:
    """Microseconds of training for a distinct token."""
    return 1e6 * step["seconds"]["train"] / step["work"]["distinct_tokens"]


def _trl(ours: Lines, load: Mapping[str, int], quick: bool) -> Iterator[dict[str, Any]]:
    """TRL's rows, by setting; then its best beside ours."""
    theirs = []
    for found in trl_rows(load, quick):
        theirs.append(found)
        yield found
    best = min((found["ms"] for found in theirs if found["ms"] is not None), default=None)
    mine = [total(line) for line in ours if line.get("kind") == "forced"][1:]
    if best and mine:
        times = best / 1e3 / median(mine)
        yield row("GRPO beside TRL's best", _shape(load), mine, limit_seconds=best / 1e3, times=times,
                  met=times >= TRL, target=f"{times:.2f} times as fast, wanted ≥ {TRL:g}")  # fmt: skip
