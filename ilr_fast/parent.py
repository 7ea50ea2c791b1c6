"""Whose a process is: it ends with the one that started it, or takes over what its own children leave (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Asks the kernel (Linux) for this signal when the parent ends, by default to be killed; ends at once if it has
    ended already."""
    _ask(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def adopt() -> None:
    """From here on processes whose parents end below this one become its children."""
    _ask(PR_SET_CHILD_SUBREAPER, 1)


def _ask(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
