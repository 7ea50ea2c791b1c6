"""Which keys a run of packed rows sees, as index tensors that attention kernels take; made once a micro-batch.

segments = plan.segments(device)            # plan: tree_plan.TreePlan
keys_NKD = segments.gather(keys_TKD)        # stems repeated for every run below them
gradient_TKD = segments.add_up(gradient_NKD)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from ilr_kernels.row_sums import add_rows
from torch import Tensor

KeyRun = tuple[int, int, np.ndarray]  # query rows start:end, and the rows of their keys, oldest first


def put(x: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The array's values on `device`. A GPU reads them from pinned memory when it gets there: nobody waits for it."""
    x = torch.as_tensor(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass(frozen=True, slots=True)
class Segments:
    """Runs of queries with their keys, for a kernel that takes ragged sequences; tensors are on one device.

    Run i has the query rows starts_q[i]:starts_q[i+1] and, of N gathered key rows, starts_k[i]:starts_k[i+1]: its
    ancestors' and its own. Where no prefix is shared nothing is gathered: the indices are None.
    """

    starts_q: Tensor  # int32 [runs + 1]
    starts_k: Tensor  # int32 [runs + 1]
    longest_q: int
    longest_k: int
    rows_N: Tensor | None  # int32: the row of every key
    starts_T: Tensor | None  # int32 [T + 1]: where a row's places in N begin in `places_N`
    places_N: Tensor | None  # int32: the places of all rows, row by row

    def gather(self, x_TKD: Tensor) -> Tensor:
        """Rows for the kernel [N, K, D]."""
        return x_TKD if self.rows_N is None else x_TKD.index_select(0, self.rows_N)

    def add_up(self, k_NKD: Tensor, v_NKD: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over each row's places [T, K, D]: the gradient of `gather` of keys and of values."""
        if self.starts_T is None or self.places_N is None:
            return k_NKD, v_NKD
        rows = len(self.starts_T) - 1
        k_TKD, v_TKD = (x.new_empty(rows, *x.shape[1:]) for x in (k_NKD, v_NKD))
        k_NW, v_NW, k_TW, v_TW = (x.flatten(1) for x in (k_NKD.contiguous(), v_NKD.contiguous(), k_TKD, v_TKD))
        add_rows(k_NW, v_NW, self.starts_T, self.places_N, k_TW, v_TW)
        return k_TKD, v_TKD


class Places(NamedTuple):
    """`Segments` on the host: int32 vectors, in its order."""

    starts_q: np.ndarray
    starts_k: np.ndarray
    rows_N: np.ndarray
    starts_T: np.ndarray
    places_N: np.ndarray

    @classmethod
    def of(cls, runs: Sequence[KeyRun], tokens: int) -> Places:
        """Of runs (their rows, the rows of their keys) that lie in order and cover `tokens` rows."""
        starts_q = np.array([start for start, _, _ in runs] + [tokens])
        starts_k = np.cumsum([0] + [len(rows) for _, _, rows in runs])
        rows_N = np.concatenate([rows for _, _, rows in runs])
        starts_T = np.append(0, np.cumsum(np.bincount(rows_N, minlength=tokens)))
        vectors = starts_q, starts_k, rows_N, starts_T, rows_N.argsort(kind="stable")
        return cls(*(x.astype(np.int32) for x in vectors))


def make_segments(runs: Sequence[KeyRun], tokens: int, device: torch.device) -> Segments:
    """Index tensors of runs, as in `Places`."""
    places = Places.of(runs, tokens)
    longest_q, longest_k = (int(np.diff(starts).max()) for starts in places[:2])
    starts_q, starts_k = (put(x, device) for x in places[:2])
    if places.starts_k[-1] == tokens:
        return Segments(starts_q, starts_k, longest_q, longest_k, None, None, None)
    return Segments(starts_q, starts_k, longest_q, longest_k, *(put(x, device) for x in places[2:]))
