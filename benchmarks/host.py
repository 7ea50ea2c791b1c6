"""What a call takes on the host: at few rows the GPU waits for launches, not for products.

    rows("ours", lambda: loss(x), checked_row, "cuda")

Two rows a variant, both with the GPU idle at the start. *A whole call*: the clock around it without waiting for the GPU
at its end (a call that asks the GPU something waits for that answer, and it counts). *Before the first product*: from a
kernel that does nothing, launched just before the call, to the start of the call's first matrix product, by the GPU's
own timestamps. `device_ms` is the same call's time as measured with its errors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from ilr_benchmarks.common import row

CALLS = 20
MARKER = "empty"
FILLS = ("memset", "memcpy", "elementwise")


class Span(NamedTuple):
    """A kernel on the GPU, in microseconds."""

    name: str
    start: float
    length: float


def rows(name: str, work: Callable[[], Any], checked: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """The host's rows of a variant whose row is `checked`; none where that was wrong."""
    if checked["status"] != "timed":
        return []
    found = [whole_call_row(f"{name}, a whole call", work, checked, device)]
    if device == "cuda":
        found.append(_row(f"{name}, before the first product", partial(before_first_product, work), checked))
    return found


def whole_call_row(name: str, work: Callable[[], Any], checked: dict[str, Any], device: str) -> dict[str, Any]:
    """The row of a whole call alone."""
    return _row(name, partial(whole_call, work, device), checked)


def _row(name: str, clock: Callable[[], list[float]], checked: dict[str, Any]) -> dict[str, Any]:
    seconds, status = [], checked["status"]
    try:
        if status == "timed":
            seconds = clock()
            status = "timed" if seconds else "not seen by the profiler"
    except Exception as problem:  # a profiler that fails must not take the others' figures with it
        seconds, status = [], f"not timed: {type(problem).__name__}: {str(problem)[:200]}"
    more = {"status": status, "target": None, "met": None, "targets": [], "device_ms": checked["ms"]}
    return row(f"host: {name}", checked["shape"], seconds, error=checked["error"], **more)


def whole_call(work: Callable[[], Any], device: str, calls: int = CALLS) -> list[float]:
    """Seconds of each call, from an idle GPU until the host has launched all."""
    work()
    seconds = []
    for _ in range(calls if device == "cuda" else 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        outputs = work()
        seconds.append(time.perf_counter() - start_s)
        del outputs
    return seconds


def before_first_product(work: Callable[[], Any], calls: int = CALLS) -> list[float]:
    """Seconds between the start of a kernel launched before each call and that of the call's first product."""
    from ilr_benchmarks.empty_kernel import empty

    anything = torch.empty(1, device="cuda")
    empty[(1,)](anything)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            torch.cuda.synchronize()
            empty[(1,)](anything)
            work()
        torch.cuda.synchronize()
    return delays(
        Span(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )


def delays(spans: Iterable[Span]) -> list[float]:
    """Seconds from each marker to the first product after it: a call's first kernel that is no fill and at least a
    quarter as long as its longest."""
    ordered = sorted(spans, key=lambda span: span.start)
    marks = [i for i, span in enumerate(ordered) if span.name == MARKER]
    found = []
    for i, end in zip(marks, [*marks[1:], len(ordered)], strict=True):
        call = [span for span in ordered[i + 1 : end] if not any(fill in span.name.lower() for fill in FILLS)]
        longest = max((span.length for span in call), default=0.0)
        first = next((span for span in call if span.length >= longest / 4), None)
        if first is not None:
            found.append((first.start - ordered[i].start) / 1e6)
    return found
