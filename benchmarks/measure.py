"""Errors first, then times: interleaved rounds of variants in one process; a wrong variant is not timed.

    rows = measure([Case("limit", make_limit), Case("ours", make_ours, error=…, limit="limit")], "N=…", rounds=7)

A time is the median of rounds, by CUDA events on a GPU and by the clock elsewhere. Each round takes the variants in
another order, always the same ones: a card that has just worked hard is slower, and so is what comes after it.
`extra_gib` is the peak of allocated memory in a call less what is held when it ends: inputs, gradients and log-probs,
which every variant must hold. `error` is the worst of `errors`, which names each output's. Where a step is `queued`,
the GPU has work until the call begins, as it has in training while the model's layers run: what the host does ahead of
time is then not counted, what it does while the GPU waits is (host.py measures it all, from an idle GPU).
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ilr_benchmarks.common import row
from torch import Tensor

Outputs = dict[str, Tensor]
WRONG = "wrong, not timed"
QUEUED_CYCLES = 4_000_000  # 2 to 3 ms of waiting on the GPU


@dataclass(frozen=True)
class Target:
    """`kind`: limit (× the limit, at most), gib (at most), share or faster (this time / `of`'s: at most, at least)."""

    kind: str
    bound: float
    of: str = ""

    def value(self, result: dict[str, Any], rows: dict[str, dict[str, Any]]) -> float | None:
        if self.kind == "gib":
            return result["extra_gib"]
        if self.kind == "limit":
            return result["over_limit"]
        other = rows.get(self.of, {}).get("ms")
        if other is None or result["ms"] is None:
            return None
        return other / result["ms"] if self.kind == "faster" else result["ms"] / other

    def as_dict(self, result: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
        value = self.value(result, rows)
        sign = "≥" if self.kind == "faster" else "≤"
        met = None if value is None else (value >= self.bound if self.kind == "faster" else value <= self.bound)
        unit = {"gib": "GiB", "limit": "× limit", "share": f"of {self.of}", "faster": f"× faster than {self.of}"}
        return {"target": f"{sign} {self.bound:g} {unit[self.kind]}", "value": value, "met": met}


@dataclass(frozen=True)
class Case:
    """A variant: `work()` does one call and returns its outputs; `error(outputs)` is NaN or large where it is wrong.

    `error` gives one number, or one for each output by its name; the worst of them is held against `tolerance`.
    """

    name: str
    work: Callable[[], Any]
    error: Callable[[Any], float | dict[str, float]] | None = None  # None: a limit, whose results are not used
    tolerance: float = 0.02
    limit: str | None = None
    limit_scale: float = 1.0
    targets: tuple[Target, ...] = ()
    most_rounds: int = 1000
    calls: int = 1
    batch: int = 1  # what one work() does so many times itself
    prepare: Callable[[], Any] | None = None  # before the call whose error is found
    memory: Callable[[], float | None] | None = None  # extra GiB, where the allocator of the GPU does not tell


def measure(
    cases: Sequence[Case], shape: str, rounds: int, device: str, queued: bool = False
) -> list[dict[str, Any]]:
    """Rows of all cases; those of a wrong variant have no time and `status` says why."""
    gc.collect()
    failed: dict[str, str] = {}
    errors = {case.name: _error(case, failed, device) for case in cases}
    sound = [case for case in cases if case.name not in failed]
    memory = {case.name: _extra_gib(case, device) for case in sound}
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for i in range(rounds):
        for case in random.Random(i).sample(sound, len(sound)):
            if i < case.most_rounds:
                seconds[case.name].append(_seconds(case, device, queued))
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        limit_ms = found[case.limit]["ms"] if case.limit else None
        limit = limit_ms * case.limit_scale / 1e3 if limit_ms else None
        found[case.name] = row(case.name, shape, seconds[case.name], extra_gib=memory.get(case.name),
                               error=errors[case.name].get("worst"), limit_seconds=limit)
        named = {name: value for name, value in errors[case.name].items() if name != "worst"}
        found[case.name] |= {"errors": named} if named else {}
        found[case.name]["status"] = failed.get(case.name, "timed")
    for case in cases:
        result = found[case.name]
        checked = [target.as_dict(result, found) for target in case.targets]
        result["target"] = "; ".join(c["target"] for c in checked) or None
        mets = [c["met"] for c in checked]
        result["met"] = False if False in mets else None if not mets or None in mets else True
        result["targets"] = checked
    return list(found.values())


def relative_error(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖, by slabs of rows so that float64 copies stay small."""
    if not torch.isfinite(found).all():
        return math.nan
    off, size = 0.0, 0.0
    for a, b in zip(torch.atleast_1d(found).split(8192), torch.atleast_1d(truth).split(8192), strict=True):
        off += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    return math.sqrt(off / size) if size else math.sqrt(off)


def poison(gib: float) -> None:
    """Fills memory that the GPU's allocator hands out next with NaN: what a variant forgets to write shows."""
    blocks = [torch.full((int(gib * 2**28 / 4),), math.nan, device="cuda") for _ in range(4)]
    blocks += [torch.full((2**18,), math.nan, device="cuda") for _ in range(16)]
    del blocks


def _error(case: Case, failed: dict[str, str], device: str) -> dict[str, float | None]:
    """The errors by output, and their `worst`; empty without any. Where that is too large `failed` says so."""
    try:
        if device == "cuda":
            gc.collect()
            poison(4)
        if case.prepare:
            case.prepare()
        outputs = case.work()
        errors = case.error(outputs) if case.error else {}
        if device == "cuda":
            torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        failed[case.name] = "does not fit"
        return {}
    except Exception as problem:  # one variant's failure must not take the others' figures with it
        failed[case.name] = f"{WRONG}: {type(problem).__name__}: {str(problem)[:200]}"
        return {}
    finally:
        outputs = None
        if device == "cuda":
            torch.cuda.empty_cache()
    named = errors if isinstance(errors, dict) else {"worst": errors}
    if not named:
        return {}
    worst = math.inf if any(math.isnan(error) for error in named.values()) else max(named.values())
    if worst > case.tolerance:
        failed[case.name] = WRONG
    return {name: error if math.isfinite(error) else None for name, error in (*named.items(), ("worst", worst))}


def _extra_gib(case: Case, device: str) -> float | None:
    if case.memory:
        return case.memory()
    if device != "cuda" or case.error is None:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    outputs = case.work()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del outputs
    return extra / 2**30


def _seconds(case: Case, device: str, queued: bool) -> float:
    """Seconds of one call (the mean of `calls` where one is too short to time)."""
    if device != "cuda":
        start_s = time.perf_counter()
        for _ in range(case.calls):
            case.work()
        return (time.perf_counter() - start_s) / case.calls / case.batch
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if queued:
        torch.cuda._sleep(QUEUED_CYCLES)
    start.record()
    for _ in range(case.calls):
        case.work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / case.calls / case.batch
