"""Where a rollout's time goes: the GPU's idle share, and what the host did meanwhile.

    found = measured(engine, load, FULL)    # after so many steps the engine's slots are in use by `load`
    found.profiled, found.share, found.host, found.gaps

The times of all kernels and copies come from torch's profiler, which itself slows the host. So two shares are given: of
the profiled steps, and of as many steps without the profiler just before and after (what the GPU had to do in a
profiled step, over what such a step took). The host's time is parted by the functions that vLLM's core calls in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ilr_benchmarks.rollout_load import Load, talk

FULL, LATE = 150, 1400  # steps before anything is measured: all slots are in use then; few are
Span = tuple[int, int]  # ns

OURS = "dialogues, the event loop and admission"


@dataclass(frozen=True, slots=True)
class Idle:
    """`profiled` and `share`: idle shares under the profiler and without it. The rest in ms a step:

    `step` and `busy`: a whole one without the profiler, and its kernels; `host`: what the host did in it; `gaps`: the
    GPU's idle time under the profiler, by what the host did then.
    """

    profiled: float
    share: float
    step: float
    busy: float
    host: dict[str, float]
    gaps: dict[str, float]


def measured(engine: Any, load: Load, first: int, steps: int = 80) -> Idle:
    """Runs `load` for `first` + 3 · `steps` steps and gives it up."""
    engine.weights_changed()
    with _parts(engine) as parts:
        windows, events = asyncio.run(_some_steps(engine, load, first, steps, parts))
    before, profiled, after = windows
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events)
    gaps, busy = _gaps(spans)
    whole = spans[-1][1] - spans[0][0]
    plain = [end - start for start, end in (before, after)]
    host = _by_part(parts, [before, after])
    return Idle(
        profiled=1 - busy / whole,
        share=1 - 2 * busy / sum(plain),
        step=sum(plain) / 2 / steps / 1e6,
        busy=busy / steps / 1e6,
        host={name: value / 2 / steps / 1e6 for name, value in host.items()},
        gaps={name: value / steps / 1e6 for name, value in _by_part(parts, gaps).items()},
    )


async def _some_steps(
    engine: Any, load: Load, first: int, steps: int, parts: list[tuple[str, Span]]
) -> tuple[list[Span], Any]:
    """Three windows of `steps` steps, and the second one's kernels and copies."""
    from torch.profiler import ProfilerActivity, profile

    task = asyncio.create_task(talk(engine, load))
    await _steps(engine, first)
    windows = [await _window(engine, steps)]
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        windows.append(await _window(engine, steps))
        torch.cuda.synchronize()
    await _steps(engine, 5)
    windows.append(await _window(engine, steps))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    events = seen.profiler.kineto_results.events()
    return windows, [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA]


async def _window(engine: Any, steps: int) -> Span:
    start = time.time_ns()
    await _steps(engine, steps)
    return start, time.time_ns()


async def _steps(engine: Any, number: int) -> None:
    goal = engine.stats().steps + number
    while engine.stats().steps < goal:
        await asyncio.sleep(0)


@contextlib.contextmanager
def _parts(engine: Any) -> Iterator[list[tuple[str, Span]]]:
    """While open: what the parts of a step take, one after the other, is added to the list."""
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    from ilr_fast.engines.vllm_results import results_class

    core = engine._core.client.engine_core
    found: list[tuple[str, Span]] = []

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            start = time.time_ns()
            try:
                return work(*args, **named)
            finally:
                found.append((name, (start, time.time_ns())))

        return wrapped

    wait = timed("waiting for the GPU", lambda out: out.copy_event.synchronize())

    def waited(taken: Callable[..., Any]) -> Callable[..., Any]:
        return lambda out: (wait(out), timed("results to the host's form", taken)(out))[1]

    places = [
        (core.scheduler, "schedule", "scheduling"),
        (core.scheduler, "update_from_output", "taking results: vLLM's scheduler"),
        (core.model_executor, "execute_model", "preparing and launching the model"),
        (core.model_executor, "sample_tokens", "launching the sampler"),
        (engine, "_take", "taking results: the engine"),
    ]
    for owner, attribute, name in places:
        setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    forms = [(kind, kind.get_output) for kind in (AsyncOutput, results_class())]
    for kind, taken in forms:
        kind.get_output = waited(taken)
    try:
        yield found
    finally:
        for kind, taken in forms:
            kind.get_output = taken
        for owner, attribute, _ in places:
            delattr(owner, attribute)


def _gaps(spans: list[Span]) -> tuple[list[Span], int]:
    """Between the first span and the last: where there was none, and how long there was one."""
    gaps, busy, end = [], 0, spans[0][0]
    for first, last in spans:
        if first > end:
            gaps.append((end, first))
        busy += max(0, last - max(first, end))
        end = max(end, last)
    return gaps, busy


def _by_part(parts: list[tuple[str, Span]], windows: list[Span]) -> dict[str, float]:
    """The windows' time in ns by the part of a step that it fell in; what is in none is the dialogues'."""
    found: dict[str, float] = defaultdict(float)
    parts = sorted(parts, key=lambda part: part[1])
    place = 0
    for start, end in windows:  # both are sorted
        rest = end - start
        while place < len(parts) and parts[place][1][1] <= start:
            place += 1
        for name, (first, last) in parts[place:]:
            if first >= end:
                break
            inside = min(end, last) - max(start, first)
            found[name] += inside
            rest -= inside
        found[OURS] += rest
    return dict(sorted(found.items(), key=lambda item: -item[1]))
