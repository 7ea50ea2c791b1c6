"""What a region of memory (regions.py) asks of a device and of the host: to map, to copy, and to say what is free."""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from pathlib import Path
from typing import Protocol

import torch

from ilr_fast.allocator import in_large_pages

Handle = tuple[int, int, int, int]  # device, bytes, address, CUDA's handle of the physical memory
GIB = 2**30


class OutOfMemory(RuntimeError):
    """There is too little memory: `needed` bytes and `free` bytes, on the device or (`on_host`) in the host."""

    def __init__(self, needed: int, free: int, on_host: bool = False):
        place = "the host" if on_host else "the device"
        super().__init__(f"{needed / GIB:.3g} GiB are needed and {free / GIB:.3g} GiB of {place}'s memory are free")


class Driver(Protocol):
    """What a region asks of the device; addresses and sizes in bytes."""

    def map(self, handle: Handle) -> None:
        """Puts new memory under the addresses. RuntimeError where there is none."""
        ...

    def unmap(self, handle: Handle) -> None:
        """Gives the memory back."""
        ...

    def copy(self, to: int, source: int, size: int) -> None:
        """Copies between host and device, and waits for it."""
        ...

    def zero(self, address: int, size: int) -> None:
        """Fills with zeros."""
        ...

    def synchronize(self) -> None:
        """Waits until nothing runs."""
        ...

    def free(self) -> int:
        """Bytes that are free on the device."""
        ...

    def forget_failure(self) -> None:
        """After memory that torch asked for was not there: what is asked for next is answered anew."""
        ...


class CudaDriver:
    """A CUDA device, by vLLM's and torch's functions."""

    def __init__(self, device: torch.device):
        from vllm.device_allocator import cumem

        self._cumem, self._device = cumem, device

    def map(self, handle: Handle) -> None:
        """See Driver."""
        self._cumem.create_and_map(handle)

    def unmap(self, handle: Handle) -> None:
        """See Driver."""
        self._cumem.unmap_and_release(handle)

    def copy(self, to: int, source: int, size: int) -> None:
        """See Driver."""
        self._cumem.libcudart.cudaMemcpy(to, source, size)

    def zero(self, address: int, size: int) -> None:
        """See Driver."""
        self._cumem.libcudart.cudaMemset(address, 0, size)

    def synchronize(self) -> None:
        """See Driver."""
        torch.cuda.synchronize(self._device)

    def free(self) -> int:
        """See Driver."""
        return torch.cuda.mem_get_info(self._device)[0]

    def forget_failure(self) -> None:
        """See Driver. vLLM's allocator keeps its last error, and fails, until a call from Python has reported one."""
        with contextlib.suppress(RuntimeError):
            self._cumem.create_and_map((0, 0, 0, 0))  # no size, which CUDA refuses


def pinned(size: int) -> torch.Tensor:
    """`size` bytes of host memory, locked in place for fast copies where a CUDA device is used. OutOfMemory."""
    free = available_host_memory()
    if size > free:
        raise OutOfMemory(size, free, on_host=True)
    buffer = in_large_pages(torch.empty(size, dtype=torch.uint8))
    if torch.cuda.is_initialized():  # torch's own pinned memory comes in powers of two
        cudart, address = torch.cuda.cudart(), buffer.data_ptr()
        if int(cudart.cudaHostRegister(address, size, 0)) == 0:  # else copies take longer
            weakref.finalize(buffer, cudart.cudaHostUnregister, address)
    return buffer


def available_host_memory() -> int:
    """Bytes that processes can still get without swapping: of the machine's, and of their control group's limit."""
    return min(_available(), group_memory(Path("/sys/fs/cgroup")))


def _available() -> int:
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def group_memory(group: Path) -> int:
    """Bytes left under the limit of a control group (version 2); files that were read and not used since can go."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((group / "memory.max").read_text())  # "max" is none
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - int((group / "memory.current").read_text()) + int(held["inactive_file"])
    return sys.maxsize
