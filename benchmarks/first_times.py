"""What a piece of work pays because something comes for the first time: kernels that Triton compiles, and memory
that the allocator has to ask the driver for.

    with FirstTimes() as seen:
        step()
    seen.as_dict()      # {"compiled": {"product_kernel": 2}, "compile_seconds": 3.1, "mallocs": 12, "retries": 0}
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from triton import knobs

MALLOCS, RETRIES = "num_device_alloc", "num_alloc_retries"


class FirstTimes:
    """Counts while it is entered; `compiled` are kernels by name, those found in Triton's cache on the disk too."""

    def __init__(self) -> None:
        self.compiled: Counter[str] = Counter()
        self.compile_seconds = 0.0
        self.mallocs = self.retries = 0

    def __enter__(self) -> FirstTimes:
        self._before, self._listener = _memory(), knobs.compilation.listener
        knobs.compilation.listener = self._heard
        return self

    def __exit__(self, *_: object) -> None:
        knobs.compilation.listener = self._listener
        after = _memory()
        self.mallocs, self.retries = (after[key] - self._before[key] for key in (MALLOCS, RETRIES))

    def as_dict(self) -> dict[str, Any]:
        """The counts, for a row of results."""
        return {
            "compiled": dict(self.compiled),
            "compile_seconds": round(self.compile_seconds, 3),
            "mallocs": self.mallocs,
            "retries": self.retries,
        }

    def _heard(self, *, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        self.compiled[getattr(src, "name", None) or str(src)] += 1
        self.compile_seconds += times.total / 1e6


def _memory() -> dict[str, int]:
    found = torch.cuda.memory_stats() if torch.cuda.is_available() else {}
    return {key: int(found.get(key, 0)) for key in (MALLOCS, RETRIES)}
