"""Which keys a run of packed rows sees, as index tensors that attention kernels take; made once a micro-batch.

segments = plan.segments(device)            # plan: tree_plan.TreePlan
keys_NKD = segments.gather(keys_TKD)        # stems repeated for every run below them
gradient_TKD = segments.add_up(gradient_NKD)
"""

from __future__ import annotations

from dataclasses import dataclass

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
    rows_N: Tensor | None  # int64: the row of every key
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


def make_segments(runs: list[KeyRun], tokens: int, device: torch.device) -> Segments:
    """Index tensors of runs (their rows, the rows of their keys) that lie in order and cover `tokens` rows."""
    starts_q = np.array([start for start, _, _ in runs] + [tokens])
    starts_k = np.cumsum([0] + [len(rows) for _, _, rows in runs])
    longest_q, longest_k = int(np.diff(starts_q).max()), int(np.diff(starts_k).max())

    def on_device(x: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return put(torch.as_tensor(x, dtype=dtype), device)

    on_q, on_k = on_device(starts_q, torch.int32), on_device(starts_k, torch.int32)
    if starts_k[-1] == tokens:
        return Segments(on_q, on_k, longest_q, longest_k, None, None, None)
    rows_N = np.concatenate([rows for _, _, rows in runs])
    by_row = np.argsort(rows_N, kind="stable")
    starts_T = np.append(0, np.cumsum(np.bincount(rows_N, minlength=tokens)))
    on_T, on_N = on_device(starts_T, torch.int32), on_device(by_row, torch.int32)
    return Segments(on_q, on_k, longest_q, longest_k, on_device(rows_N), on_T, on_N)
