"""A worker's signs of life: not that its process is there, but that its work goes on.

    Pulse(lambda message: messages.write(answers, message)).start()     # in the worker
    {"pulse": 17, "at": "agent.py:211 _optimize"}                       # every second; the number grows with progress

The number grows when, since the second before, the count of work units (ticks.py) has grown, the main thread stands
somewhere else, or bytes have gone to or from the disk. So a long update, a large file and a slow compilation are no
hang; a kernel that never ends, a lock that nobody opens and a process that is stopped are.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ilr_fast.ticks import ticks

SECONDS = 1.0  # between two signs


class Pulse(threading.Thread):
    """Sends signs until the process ends. `send` writes one message."""

    def __init__(self, send: Callable[[dict[str, Any]], object]):
        super().__init__(name="pulse", daemon=True)
        self._send = send

    def run(self) -> None:
        """See the module."""
        moves, last = 0, None
        with contextlib.suppress(OSError):  # the host has gone
            while True:
                time.sleep(SECONDS)
                frames = list(_frames(sys._current_frames().get(threading.main_thread().ident or 0)))
                state = ticks(), tuple((id(f.f_code), f.f_lasti) for f in frames), _disk()
                moves += state != last
                last = state
                self._send({"pulse": moves, "at": _place(frames)})


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(frames: list[FrameType]) -> str:
    """Where the main thread is: the innermost function of this package, else of all."""
    own = str(Path(__file__).resolve().parents[1])
    found = next((f for f in frames if f.f_code.co_filename.startswith(own)), frames[0] if frames else None)
    if found is None:
        return "nowhere"
    return f"{Path(found.f_code.co_filename).name}:{found.f_lineno} {found.f_code.co_name}"


def _disk() -> tuple[str, ...]:
    """Bytes that this process has read from and written to disks (Linux)."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return ()
    return tuple(line for line in lines if line.startswith(("read_bytes", "write_bytes")))
