"""Which tokens end a request, for many requests at once: each has its own stop tokens, of few kinds.

ends = Ends()
kind = ends.kind(request.sampling_params)          # a number, kept with the request
ends.found(kinds_N, token_N)                       # bool [N]
"""

from __future__ import annotations

from typing import Any

import numpy as np

KINDS = 64  # of stop tokens that are told apart; each takes a byte for every token of the vocabulary


class Ends:
    """Of vLLM's sampling parameters."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, ...], int] = {}
        self._ends_KV = np.zeros((1, 1), bool)  # the last column stands for all tokens that follow

    def kind(self, parameters: Any) -> int | None:
        """The number of a request's stop tokens; None where there are too many kinds."""
        ids = tuple(parameters.stop_token_ids or ())
        if parameters.eos_token_id is not None:
            ids = *ids, parameters.eos_token_id
        if ids not in self._kinds:
            if len(self._kinds) == KINDS:
                return None
            self._add(ids)
        return self._kinds[ids]

    def _add(self, ids: tuple[int, ...]) -> None:
        number, before_KV = len(self._kinds), self._ends_KV
        width = max(before_KV.shape[1], max(ids, default=-1) + 2)
        self._ends_KV = np.zeros((number + 1, width), bool)
        self._ends_KV[:number, : before_KV.shape[1]] = before_KV[:number]
        self._ends_KV[number, list(ids)] = True
        self._kinds[ids] = number

    def found(self, kinds_N: np.ndarray, token_N: np.ndarray) -> np.ndarray:
        """Whether a request of each kind ends with its token."""
        return self._ends_KV[kinds_N, np.minimum(token_N, self._ends_KV.shape[1] - 1)]
