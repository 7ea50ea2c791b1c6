"""Which requests enter vLLM's running batch before a step: by tokens in flight, and several at a time.

A request is counted with its prompt and with what it is expected to sample: at most its limit, and no more than
requests have sampled on average so far. It enters where the sum over all that run stays below `tokens`, what the cache
of keys and values holds; so a running request rarely has to make room for another and be computed again. What is
furthest along (turns before it, then the length of its prompt) goes first, in the order of arrival where that is equal,
and nothing overtakes it.

A step that takes in a prompt can't replay the CUDA graph of a step that only decodes. So while many requests run, what
arrives waits for up to `every` steps and enters together. Counts and order decide, never the clock.

    admission = Admission(tokens=65536, slots=256)
    admission.add("7", prompt=200, limit=512, turn=1)
    for name in admission.enter(): …          # before every step
    admission.leave("7", sampled=131)
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

EVERY = 4  # steps
MANY = 8  # a request waits for others only while at least so many times as many run as wait


@dataclass(slots=True)
class Admission:
    """The requests that wait and those that run. `slots`: most that run at once."""

    tokens: int
    slots: int
    every: int = EVERY
    in_flight: int = 0
    _waiting: list[tuple[int, int, int, str, int]] = field(default_factory=list)  # −turn, −prompt, arrival, name, limit
    _running: dict[str, int] = field(default_factory=dict)  # tokens that each is counted with
    _left: set[str] = field(default_factory=set)  # names that left while they waited
    _arrivals: int = 0
    _steps: int = 0  # since something entered
    _finished: int = 0
    _sampled: int = 0

    def add(self, name: str, *, prompt: int, limit: int, turn: int = 0) -> None:
        """A request arrives: tokens of its prompt, the most that it may sample, turns of its conversation before it."""
        heapq.heappush(self._waiting, (-turn, -prompt, self._arrivals, name, limit))
        self._arrivals += 1

    def enter(self) -> list[str]:
        """The names of those that enter now, in order. Called once before every step."""
        self._steps += 1
        if not self._waiting or (self._steps < self.every and len(self._running) >= MANY * len(self._waiting)):
            return []
        names = []
        while self._waiting and len(self._running) < self.slots:
            _, prompt, _, name, limit = self._waiting[0]
            count = -prompt + self._expected(limit)
            if name not in self._left:
                if self._running and self.in_flight + count > self.tokens:
                    break
                self._running[name] = count
                self.in_flight += count
                names.append(name)
            self._left.discard(name)
            heapq.heappop(self._waiting)
        if names:
            self._steps = 0
        return names

    def leave(self, name: str, *, sampled: int | None = None) -> None:
        """A request has ended, after `sampled` tokens (None: cut off, it says nothing about lengths)."""
        if name in self._running:
            self.in_flight -= self._running.pop(name)
        else:
            self._left.add(name)
        if sampled is not None:
            self._finished += 1
            self._sampled += sampled

    def _expected(self, limit: int) -> int:
        """Tokens that a request will sample, as far as is known: its limit until others have ended."""
        return min(limit, -(-self._sampled // self._finished)) if self._finished else limit
