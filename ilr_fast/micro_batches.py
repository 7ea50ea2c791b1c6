"""Which sequences go into one micro-batch: few, full, evenly filled, with what shares a prefix side by side.

Sequences are sorted, so that those of a group stand together, and taken in that order while they fit; what room is
left goes to the largest that fit among the next few. A micro-batch's size is that of its packed row: each sequence adds
what it does not share with the one before. How many micro-batches that takes is counted first; then each is filled to
its share of what is left.

    fill([array_of_tokens, …], budget=8192)        # [[5, 2, 9], [0, 7], …]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ilr_fast.prefixes import common_prefix, sorting_key

LOOK_AHEAD = 96  # sequences among which one for the room that is left is sought


def fill(sequences: Sequence[np.ndarray], budget: int, *, share_prefixes: bool = True) -> list[list[int]]:
    """Indices by micro-batch, each of at most `budget` packed tokens; a longer sequence goes alone."""
    if not sequences:
        return []
    keys = [sorting_key(tokens) for tokens in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ordered = [sequences[s] for s in order]
    lengths = np.array([len(tokens) for tokens in ordered])
    shared = np.zeros(len(ordered), dtype=np.int64)
    if share_prefixes:
        shared[1:] = [common_prefix(*pair) for pair in pairwise(ordered)]
    parts = _fill(lengths, shared, budget)
    even = _fill(lengths, shared, budget, len(parts))
    return [[order[place] for place in part] for part in (even if len(even) <= len(parts) else parts)]


def _fill(lengths: np.ndarray, shared: np.ndarray, budget: int, number: int | None = None) -> list[list[int]]:
    """Places in sorted order by micro-batch. `shared` is what each has in common with the one before.

    With a `number` of micro-batches wanted each is filled to its share of what is left, as nearly as `budget` allows.
    """
    parts: list[list[int]] = []
    left = np.arange(len(lengths))
    shared = shared.copy()  # of those that are left, with the one before it that is left
    while len(left):
        costs = lengths[left] - shared[left]
        costs[0] = lengths[left[0]]
        sums = costs.cumsum()
        goal = budget if number is None else min(budget, -(-int(sums[-1]) // max(1, number - len(parts))))
        taken = max(1, int(np.searchsorted(sums, goal, side="right")))
        if number is not None and taken < len(left) and 2 * goal > sums[taken - 1] + sums[taken] <= 2 * budget:
            taken += int(sums[taken] <= budget)  # one more comes nearer
        room, part = goal - int(sums[taken - 1]), list(range(taken))
        at = taken
        while room > 0 and at < len(left):
            window = left[at : at + LOOK_AHEAD]
            fits = lengths[window] - np.minimum.accumulate(shared[window])
            fits = np.where(fits <= room, fits, -1)
            best = int(fits.argmax())
            if fits[best] < 0:
                break
            part.append(at + best)
            room -= int(fits[best])
            at += best + 1
        parts.append(left[part].tolist())
        left = _without(left, part, shared)
    return parts


def _without(left: np.ndarray, part: list[int], shared: np.ndarray) -> np.ndarray:
    """What is left; one that comes after some that went shares the least of what they shared."""
    gone = np.zeros(len(left), dtype=bool)
    gone[part] = True
    for place in part:
        if place + 1 < len(left):
            shared[left[place + 1]] = min(shared[left[place + 1]], shared[left[place]])
    return left[~gone]
