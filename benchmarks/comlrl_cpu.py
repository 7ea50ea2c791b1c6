"""`bench comlrl` on the CPU: a question of 12 turns, 16 tokens each, by the embedded engine (see `comlrl.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ilr_benchmarks import comlrl


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """The rows of `comlrl.run`, on the CPU."""
    return comlrl.run(rounds=rounds, quick=quick, only_ours=only_ours, device="cpu")
