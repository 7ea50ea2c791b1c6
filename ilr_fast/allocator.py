"""Freed memory of the host stays with the process, for the next step to use; large blocks of it lie in large pages;
freed memory of a GPU leaves no holes.

glibc maps every large block anew and gives it back when it is freed. A training step frees and takes some hundred MiB
of gradients and logits; the kernel then hands out the same pages again, zeroed, one fault of 4 KiB each: a tenth of a
step on the CPU, more in a virtual machine. With mapping and trimming put off, faults stop after the first steps. The
process's peak stays what it was.

A page of 4 KiB that is touched for the first time costs a fault, and one that is locked for a GPU's copies costs again:
on a virtual machine with an H200 0.9 s and 0.4 to 0.7 s a GiB. In pages of 2 MiB a GiB was locked in 0.3 to 0.4 s.

PyTorch's memory on a GPU is made of segments, and what is too large for a hole takes a new one: with sizes that change
from step to step a quarter and more lies in holes. Segments that grow have no such holes. Pools with an allocator of
their own, as vLLM's memory that can be given back, can't have them: an engine is opened with plain ones.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LARGE_PAGE = 2**21  # bytes
_MADV_HUGEPAGE = 14  # sys/mman.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """Tells malloc to keep what is freed; False where the C library has no such setting."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _NEVER) and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def in_large_pages(fresh: Tensor) -> Tensor:
    """`fresh`, a tensor of the host's that nothing has been written to; Linux is asked for large pages for it."""
    start = -(-fresh.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
    size = (fresh.data_ptr() + fresh.nbytes) // _LARGE_PAGE * _LARGE_PAGE - start
    if sys.platform.startswith("linux") and size > 0:  # a kernel that knows none says no, and nothing is lost
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return fresh


def grow_segments() -> None:
    """Tells PyTorch to let its segments on a GPU grow from here on, unless the user has told it something."""
    _let_segments_grow(True)


@contextmanager
def plain_segments() -> Iterator[None]:
    """What PyTorch takes of a GPU meanwhile is made of segments that do not grow; afterwards they grow."""
    _let_segments_grow(False)
    try:
        yield
    finally:
        _let_segments_grow(True)


def _let_segments_grow(grow: bool) -> None:
    if os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"):
        return
    import torch

    if torch.cuda.is_available() and hasattr(torch.cuda.memory, "_set_allocator_settings"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the name that replaces it differs from torch to torch
            torch.cuda.memory._set_allocator_settings(f"expandable_segments:{grow}")
