"""Engines of several processes on one GPU keep step: none is more than a step ahead of the slowest that has work.

A decoding step gives every running request a token, so by steps, and not by seconds, agents come to the end of their
dialogues together. Left to themselves the smaller model is done first, and what is left of the larger one, few requests
and small kernels one after another, has the GPU for itself: just where two engines gain most from running side by side
(docs/engines.md). Only counts are compared, and who stands still for `LONGEST` is not waited for until it moves again.

    with paced() as environment:              # processes that start with it keep step
        …
    pace = Pace.joined(os.environ)            # in such a process; None in any other
    while not pace.may_step(): …              # before every step
    pace.rest()                               # there is no work
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

PLACE = "ILR_FAST_PACE"  # an environment variable: the file
SEATS = 16  # processes that can keep step
AHEAD = 1  # steps that an engine may be ahead
LONGEST = 0.05  # seconds
_BYTES = 8 * (1 + 2 * SEATS)


class Pace:
    """One process's seat in a file that all map: the steps that each has begun, and whether it has work.

    OSError where the file is not there, ValueError where it has no seat left.
    """

    def __init__(self, path: Path):
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            shared = memoryview(mmap.mmap(file.fileno(), _BYTES)).cast("q")
            self._own = shared[0]  # seats that are taken
            shared[0] += self._own < SEATS
            fcntl.flock(file, fcntl.LOCK_UN)  # the map keeps the file open
        if self._own == SEATS:
            raise ValueError(f"{path} has no seat left")
        self._taken, self._begun, self._works = shared[:1], shared[1 : 1 + SEATS], shared[1 + SEATS :]
        self._still: dict[int, int] = {}  # those that are not waited for, until they begin another step than this
        self._held: float | None = None  # since when

    @classmethod
    def joined(cls, environment: Mapping[str, str]) -> Pace | None:
        """A seat for this process, where it is one of several and there is one."""
        with contextlib.suppress(OSError, ValueError):
            return cls(Path(environment[PLACE])) if PLACE in environment else None
        return None

    def may_step(self) -> bool:
        """Whether a step may begin now; it is counted then."""
        own, begun, others = self._own, self._begun, self._others()
        if others:
            slowest = min(begun[n] for n in others)
            least = begun[own] if self._works[own] else slowest  # who has had no work starts where the others are
            begun[own], self._works[own] = min(least, slowest + AHEAD), 1
            if begun[own] == slowest + AHEAD:
                if self._waits():
                    return False
                self._still |= {n: begun[n] for n in others if begun[n] == slowest}
        self._works[own], self._held = 1, None
        begun[own] += 1
        return True

    def rest(self) -> None:
        """Nobody waits for this process until its next step."""
        self._works[self._own] = 0

    def _others(self) -> list[int]:
        """Those that have work and move."""
        works, begun, still = self._works, self._begun, self._still
        return [n for n in range(self._taken[0]) if n != self._own and works[n] and still.get(n) != begun[n]]

    def _waits(self) -> bool:
        """Whether there is still time to wait for the slowest."""
        now = time.monotonic()
        if self._held is None:
            self._held = now
        return now < self._held + LONGEST


@contextlib.contextmanager
def paced() -> Iterator[dict[str, str]]:
    """What to add to the environment of processes that keep step. The file is in memory and leaves nothing behind."""
    file = os.memfd_create("ilr-fast-pace")
    try:
        os.truncate(file, _BYTES)
        yield {PLACE: f"/proc/{os.getpid()}/fd/{file}"}
    finally:
        os.close(file)
