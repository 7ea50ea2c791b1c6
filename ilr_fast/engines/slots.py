"""Which tokens each cache slot holds, which slot a new request should take, and what a step does to slots.

A freed slot keeps its tokens. A new request looks for the longest prefix it has in common with any slot, running ones
and those filled in the same step included. A prompt that only continues an idle slot takes that slot over (a
dialogue's next turn); else it takes the idle slot that was used longest ago, empty ones first, and the common prefix is
copied there (a group's prompt, a few-shot prefix). All choices follow from the order of the requests since the last
`clear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Placement:
    """A slot for a request, and where its first `common` tokens are: in `source`, which may be the slot itself."""

    slot: int
    source: int
    common: int


@dataclass(frozen=True, slots=True)
class Piece:
    """`new` tokens appended to the `past` ones of a slot."""

    slot: int
    past: int
    new: int


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `length` tokens of slot `source` also become those of `targets`."""

    source: int
    targets: tuple[int, ...]
    length: int


class SlotTable:
    """Tokens by slot; `length_S` of them have, or have by the end of the step, their keys and values in the cache."""

    def __init__(self, slots: int):
        self.slots = slots
        self.clear()

    def clear(self) -> None:
        """Forgets all contents and frees all slots."""
        self.tokens_SL = np.full((self.slots, 64), -1, dtype=np.int64)
        self.length_S = np.zeros(self.slots, dtype=np.int64)
        self._taken = [False] * self.slots
        self._freed_at = [0] * self.slots
        self._clock = 0
        self._sources: set[int] = set()

    def begin_step(self) -> None:
        """Copies of the step before are done: their sources may be overwritten."""
        self._sources.clear()

    def place(self, prompt: np.ndarray) -> Placement | None:
        """Takes a slot for `prompt`, or gives None where none can be had in this step."""
        common_S = self._common(prompt)
        best = int(common_S.max())
        for continued in np.flatnonzero((common_S == best) & (self.length_S == best)).tolist():
            if not self._taken[continued] and best > 0:
                self._taken[continued] = True
                return Placement(continued, continued, best)
        slot = self._oldest_idle()
        if slot is None:
            return None
        source = slot if common_S[slot] == best else int(common_S.argmax())
        self._taken[slot] = True
        self.truncate(slot, best if source == slot else 0)
        if source != slot and best:
            self._sources.add(source)
            self.extend(slot, prompt[:best])
        return Placement(slot, source, best)

    def extend(self, slot: int, tokens: np.ndarray) -> None:
        """Notes tokens that are computed in this step, after those the slot holds."""
        start = int(self.length_S[slot])
        end = start + len(tokens)
        if end > self.tokens_SL.shape[1]:
            more = max(end, 2 * self.tokens_SL.shape[1]) - self.tokens_SL.shape[1]
            self.tokens_SL = np.pad(self.tokens_SL, ((0, 0), (0, more)), constant_values=-1)
        self.tokens_SL[slot, start:end] = tokens
        self.length_S[slot] = end

    def truncate(self, slot: int, length: int) -> None:
        """Forgets what the slot holds after `length` tokens."""
        self.tokens_SL[slot, length:] = -1
        self.length_S[slot] = length

    def free(self, slot: int) -> None:
        """The slot is idle; its tokens stay until it is taken for another prompt."""
        self._clock += 1
        self._taken[slot], self._freed_at[slot] = False, self._clock

    def _common(self, prompt: np.ndarray) -> np.ndarray:
        width = min(len(prompt), self.tokens_SL.shape[1])
        different_SL = self.tokens_SL[:, :width] != prompt[:width]
        return np.where(different_SL.any(1), different_SL.argmax(1), width)

    def _oldest_idle(self) -> int | None:
        idle = [s for s in range(self.slots) if not self._taken[s] and s not in self._sources]
        return min(idle, key=lambda s: (self.length_S[s] > 0, self._freed_at[s], s), default=None)
