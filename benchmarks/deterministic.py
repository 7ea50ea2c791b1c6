"""What `deterministic: true` costs the training part of a step, and whether it holds: a row of `bench train_step`.

Two updates on the same sequences at the same weights (a rate of 0 leaves them alone) must give gradients of the same
bits; `error` is the share of tensors whose bits differ, by the sums of their bits as integers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ilr_fast.types import TrainingSequence


def deterministic_row(bench: Any, given: Sequence[TrainingSequence]) -> dict[str, Any]:
    """A row for forced lengths with deterministic kernels, with what differs with them and without."""
    free = differing(bench, given)
    with deterministic():
        found = bench.measure("forced, deterministic", given, share=True)
        found["error"] = differing(bench, given)
    wrong = {"status": "wrong: gradients differ"} if found["error"] else {}
    return found | {"error_without": free} | wrong


def differing(bench: Any, given: Sequence[TrainingSequence]) -> float:
    """The share of gradients whose bits differ between two updates at the same weights."""
    first, second = (_bits(bench, given) for _ in range(2))
    return sum(a != b for a, b in zip(first, second, strict=True)) / len(first)


@contextmanager
def deterministic() -> Iterator[None]:
    """As a run sets it (hosts/local.py)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _bits(bench: Any, given: Sequence[TrainingSequence]) -> list[int]:
    """A sum of each gradient's bits, of one update at a rate of 0."""
    optimizer, found = bench.agent.optimizer, []

    def step(number: int, *, loss_scale: float = 1.0, sinks: Any = None) -> Any:
        for parameter in bench.agent.model.parameters():
            gradient = (sinks or {}).get(parameter, parameter.grad)
            if gradient is not None:
                kind = torch.int16 if gradient.element_size() == 2 else torch.int32
                found.append(int(gradient.detach().contiguous().view(kind).sum(dtype=torch.int64)))
        return real(number, loss_scale=loss_scale, sinks=sinks)

    real, config = optimizer.step, optimizer.config
    optimizer.step, optimizer.config = step, replace(config, lr=0.0)
    try:
        bench._step(given)
    finally:
        optimizer.step, optimizer.config = real, config
    return found
