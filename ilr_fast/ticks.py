"""A count of units of work, for who watches whether a process makes progress (hosts/pulse.py).

    tick()          # one step of an engine, one pass over a micro-batch
    ticks()         # how many so far in this process
"""

from __future__ import annotations

import itertools

_counter = itertools.count(1)
_last = 0


def tick() -> None:
    """Counts one more."""
    global _last
    _last = next(_counter)


def ticks() -> int:
    """The count so far; may be read in any thread."""
    return _last
