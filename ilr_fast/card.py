"""How much memory the cards and the host have, and how much of a card all processes hold together (NVML).

    with PeakSampler() as sampler:
        ...
        sampler.take()        # bytes held beyond what others held at the start, at most, since the last call

PyTorch knows what its own process allocates; a card's memory also holds CUDA contexts, libraries, graphs, and every
other process. NVML, which comes with the driver, tells the whole; it is asked directly, without a package.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

INTERVAL = 0.02  # seconds between two looks


class CardMemory(NamedTuple):
    """Bytes."""

    total: int
    used: int


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def card_memory() -> list[CardMemory]:
    """Of each visible card, in CUDA's order; empty where there is none, or no NVML. Makes no CUDA context."""
    library = _nvml()
    found = []
    for handle in _handles() if library is not None else ():
        memory = _Memory()
        if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0:
            found.append(CardMemory(memory.total, memory.used))
    return found


def host_memory() -> int | None:
    """Bytes that this process and its children may have in all: the machine's, or its control group's limit."""
    sizes = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text().strip() if Path(file).is_file() else ""
        if text.isdigit():
            sizes.append(int(text))
    return min(sizes, default=None)


class PeakSampler:
    """A thread that looks at the cards' memory every 20 ms; does nothing where there is no card.

    Counts what is held beyond what was held when it was made: so make it before this process uses a card.
    """

    def __init__(self, look: Callable[[], Sequence[CardMemory]] = card_memory, interval: float = INTERVAL):
        self._look, self._interval = look, interval
        self._before = [memory.used for memory in look()]
        self._peak, self._looked = 0, False
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="card memory", daemon=True) if self._before else None

    def __enter__(self) -> PeakSampler:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def take(self) -> int | None:
        """The largest of all cards since the last call, in bytes; None without a card.

        It looks itself only where nobody has since then: the driver may take milliseconds to answer.
        """
        if self._thread is None:
            return None
        if not self._looked:
            self._sample()
        with self._lock:
            peak, self._peak, self._looked = self._peak, 0, False
        return peak

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        held = [now.used - before for now, before in zip(self._look(), self._before, strict=False)]
        with self._lock:
            self._peak, self._looked = max(self._peak, *held, 0), True


@cache
def _nvml() -> Any:
    """NVML, initialized; None where there is none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None


@cache
def _handles() -> tuple[ctypes.c_void_p, ...]:
    """NVML's handles of the cards that CUDA_VISIBLE_DEVICES shows, by number or UUID."""
    library, count = _nvml(), ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count.value)] if visible is None else [v.strip() for v in visible.split(",")]
    handles = []
    for name in names:
        handle = ctypes.c_void_p()
        by_index = name.isdigit()
        get = library.nvmlDeviceGetHandleByIndex_v2 if by_index else library.nvmlDeviceGetHandleByUUID
        if get(ctypes.c_uint(int(name)) if by_index else name.encode(), ctypes.byref(handle)) != 0:
            break  # as CUDA does: what follows a device that is not there is not visible
        handles.append(handle)
    return tuple(handles)
