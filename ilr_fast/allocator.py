"""Freed memory stays with the process, for the next step to use.

glibc maps every large block anew and gives it back when it is freed. A training step frees and takes some hundred MiB
of gradients and logits; the kernel then hands out the same pages again, zeroed, one fault of 4 KiB each: a tenth of a
step on the CPU, more in a virtual machine. With mapping and trimming put off, faults stop after the first steps. The
process's peak stays what it was.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """Tells malloc to keep what is freed; False where the C library has no such setting."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _NEVER) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
