"""Calibrated advantages in one launch, beside an empty kernel's launch and the eager reference on the same device.

    ilr-fast bench advantage

M agents, Q = 3 · 1,024 question-stages, G samples. Times are of many calls in a row, as the host launches them and as a
CUDA graph of them; an empty Triton kernel is measured the same two ways. At least 31 rounds of them: what the host does
takes microseconds, and a round takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ilr_benchmarks.measure import Case, Target, measure, relative_error
from ilr_kernels import reference
from ilr_kernels.advantage import calibrated_advantage
from torch import Tensor

AGENTS, GROUPS, QUESTIONS = (2, 3, 4, 8), (8, 16, 32, 64), 3 * 1024
CALLS = 200
EMPTY, EAGER = "empty kernel", "eager reference"
LEAST_ROUNDS = 31
SMALL = 2**20  # bytes: below, a launch is what counts


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> list[dict[str, Any]]:
    """Rows for every number of agents and every group size."""
    sizes = [(2, 16, 8)] if quick else [(m, QUESTIONS, g) for m in AGENTS for g in GROUPS]
    rows = []
    for m, q, g in sizes:
        torch.manual_seed(0)
        rewards_MQG = torch.randint(0, 5, (m, q, g), device=device) / 4
        repeats = rounds if quick else max(rounds, LEAST_ROUNDS)
        rows += measure(cases(rewards_MQG, device), f"M={m} Q={q} G={g}", repeats, device)
        if device == "cuda":
            kernels = launches(lambda r=rewards_MQG: calibrated_advantage(r))
            for row in rows[-5:]:
                if row["variant"] == "ours":
                    row["launches"] = kernels
                    row["targets"].append({"target": "1 launch", "value": kernels, "met": kernels == 1})
                    row["target"] = "; ".join(t["target"] for t in row["targets"])
                    row["met"] = all(t["met"] for t in row["targets"])
    return rows


def cases(rewards_MQG: Tensor, device: str) -> list[Case]:
    truth = reference.calibrated_advantage(rewards_MQG.double())

    def error(found: tuple[Tensor, Tensor]) -> float:
        return max(relative_error(a, b) for a, b in zip(found, truth, strict=True))

    def ours() -> Any:
        return calibrated_advantage(rewards_MQG)

    def eager() -> Any:
        return reference.calibrated_advantage(rewards_MQG)

    fast = Target("faster", 10, EAGER)
    reference_case = Case(EAGER, eager, error, tolerance=1e-3, calls=5, most_rounds=3)
    if device != "cuda":
        return [reference_case, Case("ours", ours, error, tolerance=1e-4, calls=20)]
    empty = empty_kernel(device)
    small = rewards_MQG.nbytes < SMALL
    launch = (Target("limit", 2),) if small else ()
    return [
        Case(EMPTY, empty, calls=CALLS),
        Case(EMPTY + ", graph", graph(empty), batch=CALLS),
        reference_case,
        Case("ours", ours, error, tolerance=1e-4, calls=CALLS, limit=EMPTY, targets=(*launch, fast)),
        Case("ours, graph", graph(ours), error, tolerance=1e-4, limit=EMPTY + ", graph", batch=CALLS),
    ]  # fmt: skip


def empty_kernel(device: str) -> Callable[[], None]:
    from ilr_benchmarks.empty_kernel import empty

    anything = torch.empty(1, device=device)
    return lambda: empty[(1,)](anything)


def graph(work: Callable[[], Any]) -> Callable[[], Any]:
    """Replays CALLS calls of work, captured, and returns what the last one wrote."""
    work()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(CALLS):
            result = work()

    def replay() -> Any:
        captured.replay()
        return result

    return replay


def launches(work: Callable[[], Any]) -> int:
    """Kernels on the GPU in one call, by the profiler."""
    work()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
