"""Holds all of a card's memory but so many GiB, so that what does not fit there fails, as it would on a smaller card.

    python -m ilr_benchmarks.ballast 22        # says `ready`; holds until its input ends

    with ballast(22):                          # the same as a process beside this one
        ...

What another process sees as free is then the size that was asked for, contexts and all. The driver is called directly:
nothing else is loaded.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

GIB = 2**30


@contextmanager
def ballast(gib: float) -> Iterator[None]:
    """`gib` GiB of the first card stay free while inside; RuntimeError where there are fewer."""
    command = [sys.executable, "-m", "ilr_benchmarks.ballast", str(gib)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        said = process.stdout.readline().strip()
        if said != "ready":
            raise RuntimeError(f"no ballast: {said or 'the process ended'}")
        yield
    finally:
        process.stdin.close()
        process.wait(timeout=30)


def hold(gib: float) -> None:
    """Takes the memory, says so, and keeps it until the standard input ends."""
    driver = ctypes.CDLL("libcuda.so.1")
    context, device, place = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_uint64()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _check(driver.cuInit(0), "cuInit")
    _check(driver.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    _check(driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "cuMemGetInfo")
    size = free.value - int(gib * GIB)
    if size > 0:
        _check(driver.cuMemAlloc_v2(ctypes.byref(place), ctypes.c_size_t(size)), "cuMemAlloc")
    print("ready" if size > 0 else f"{free.value / GIB:.1f} GiB are free", flush=True)
    sys.stdin.read()


def _check(status: int, call: str) -> None:
    if status != 0:
        raise SystemExit(f"{call} gives {status}")


if __name__ == "__main__":
    hold(float(sys.argv[1]))
