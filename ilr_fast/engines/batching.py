"""Continuous batching: which requests run, and what one step computes for each of them.

Running requests come first, one token each or what is left of a prompt that did not fit into one step; then new
requests, in order, while slots and the budget of prompt tokens last. What a new request has in common with any slot is
not computed again: it is found in place, or copied within the step; of equal prompts that come in together one is
computed and the others sample from its row. Plain bookkeeping over token ids, without tensors.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ilr_fast.engines.slots import Copy, Piece, SlotTable
from ilr_fast.types import Generation, Sampling


@dataclass(slots=True, eq=False)
class Request:
    """`tokens` are the prompt and what was sampled; the keys of the first `computed` are in the cache of `slot`."""

    tokens: list[int]
    prompt: int
    limit: int  # tokens at most, the prompt included
    sampling: Sampling
    future: asyncio.Future[Generation]
    slot: int = -1
    computed: int = 0
    logps: list[float] = field(default_factory=list)

    @property
    def sampled(self) -> list[int]:
        """The tokens sampled so far."""
        return self.tokens[self.prompt :]


@dataclass(slots=True)
class Step:
    """What one forward pass computes: by request its new tokens; who samples from whose row; what slots copy."""

    pieces: dict[Request, Piece] = field(default_factory=dict)
    shares_row_of: dict[Request, Request] = field(default_factory=dict)
    prefixes: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (slot, length) → slots

    @property
    def copies(self) -> list[Copy]:
        """Prefixes that are copied from one slot into others."""
        return [Copy(source, tuple(targets), length) for (source, length), targets in self.prefixes.items()]

    @property
    def requests(self) -> list[Request]:
        """All requests that a step gives a token to."""
        return [*self.pieces, *self.shares_row_of]


class Batcher:
    """The queue, the running requests and the slots. Depends on the order of calls alone."""

    def __init__(self, slots: int, token_budget: int):
        self.queue: deque[Request] = deque()
        self.running: list[Request] = []
        self.tokens_prompt = 0  # of all that came in; `tokens_reused` of them were not computed again
        self.tokens_reused = 0
        self._budget = token_budget
        self._table = SlotTable(slots)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.queue and not self.running

    def schedule(self) -> Step:
        """The next step. Its tokens count as computed from here on."""
        step, budget = Step(), self._budget
        self._table.begin_step()
        for request in self.running:
            left = len(request.tokens) - request.computed
            new = 1 if left == 1 else min(left, budget)
            if new:
                self._add_piece(step, request, new)
                budget -= new if left > 1 else 0
        while self.queue and budget > 0:
            used = self._admit(step, self.queue[0], budget)
            if used is None:
                break
            self.running.append(self.queue.popleft())
            budget -= used
        return step

    def leave(self, request: Request, *, keep: bool = True) -> None:
        """The request has ended; its slot is idle and keeps its tokens for others to reuse, if they are good."""
        self.running.remove(request)
        if not keep:
            self._table.truncate(request.slot, 0)
        self._table.free(request.slot)

    def drop(self, unwanted: Callable[[Request], bool]) -> None:
        """Ends running and waiting requests that nobody wants any more."""
        for request in [r for r in self.running if unwanted(r)]:
            self.leave(request)
        self.queue = deque(r for r in self.queue if not unwanted(r))

    def forget(self) -> None:
        """Nothing is computed any more: the running requests come in again, before those that wait."""
        self._table.clear()
        for request in reversed(self.running):
            request.slot, request.computed = -1, 0
            self.queue.appendleft(request)
        self.running = []

    def _admit(self, step: Step, request: Request, budget: int) -> int | None:
        """Gives a request its slot and first piece; the prompt tokens used up, or None where it has to wait."""
        total = len(request.tokens)
        place = self._table.place(np.asarray(request.tokens, dtype=np.int64))
        if place is None:
            return None
        request.slot, common = place.slot, place.common
        leader = _row_owner(step, place.source, total) if common == total else None
        if common == total and leader is None:
            common -= 1  # its last token is run again, for the logits
            self._table.truncate(request.slot, common)
        if place.source != request.slot and common:
            step.prefixes.setdefault((place.source, common), []).append(request.slot)
        request.computed = common
        self.tokens_prompt += total
        self.tokens_reused += common
        if leader is not None:
            step.shares_row_of[request] = leader
            return 0
        new = min(total - common, budget)
        self._add_piece(step, request, new)
        return new

    def _add_piece(self, step: Step, request: Request, new: int) -> None:
        step.pieces[request] = Piece(request.slot, request.computed, new)
        self._table.extend(request.slot, np.asarray(request.tokens[request.computed : request.computed + new]))
        request.computed += new


def _row_owner(step: Step, slot: int, length: int) -> Request | None:
    """The request whose last row in this step follows the `length` tokens of `slot`, if there is one."""
    for request, piece in step.pieces.items():
        if piece.slot == slot and piece.past + piece.new == length:
            return request
    return next((leader for follower, leader in step.shares_row_of.items() if follower.slot == slot), None)
