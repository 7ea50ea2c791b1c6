"""Which keys a run of packed rows sees, as index tensors that attention kernels take; made once a micro-batch.

segments = plan.segments(device)            # plan: tree_plan.TreePlan
keys_NKD = segments.gather(keys_TKD)        # stems repeated for every run below them
gradient_TKD = segments.add_up(gradient_NKD)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

KeyRun = tuple[int, int, np.ndarray]  # query rows start:end, and the rows of their keys, oldest first


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
    place_T: Tensor | None  # int64: one of each row's places in N
    stem_rows: Tensor | None  # int64: rows with several places
    stem_places: Tensor | None  # int64: all of these places, row by row
    stem_starts: Tensor | None  # int64: where a row's places begin, and their number

    def gather(self, x_TKD: Tensor) -> Tensor:
        """Rows for the kernel [N, K, D]."""
        return x_TKD if self.rows_N is None else x_TKD.index_select(0, self.rows_N)

    def add_up(self, x_NKD: Tensor) -> Tensor:
        """The sum over each row's places [T, K, D]: the gradient of `gather`, in a fixed order."""
        if self.place_T is None:
            return x_NKD
        assert self.stem_rows is not None and self.stem_places is not None and self.stem_starts is not None
        x_TKD = x_NKD.index_select(0, self.place_T)
        if len(self.stem_rows):
            wide = x_NKD.index_select(0, self.stem_places).flatten(1)
            wide = wide if wide.dtype == torch.float64 else wide.float()
            sums = torch.segment_reduce(wide, "sum", offsets=self.stem_starts, axis=0)
            x_TKD.index_copy_(0, self.stem_rows, sums.to(x_NKD.dtype).unflatten(1, x_NKD.shape[1:]))
        return x_TKD


def make_segments(runs: list[KeyRun], tokens: int, device: torch.device) -> Segments:
    """Index tensors of runs (their rows, the rows of their keys) that lie in order and cover `tokens` rows."""
    starts_q = np.array([start for start, _, _ in runs] + [tokens])
    starts_k = np.cumsum([0] + [len(rows) for _, _, rows in runs])
    longest_q, longest_k = int(np.diff(starts_q).max()), int(np.diff(starts_k).max())

    def on_device(x: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(x, dtype=dtype, device=device)

    on_q, on_k = on_device(starts_q, torch.int32), on_device(starts_k, torch.int32)
    if starts_k[-1] == tokens:
        return Segments(on_q, on_k, longest_q, longest_k, None, None, None, None, None)
    rows_N = np.concatenate([rows for _, _, rows in runs])
    by_row = np.argsort(rows_N, kind="stable")
    counts_T = np.bincount(rows_N, minlength=tokens)
    first_T = np.cumsum(counts_T) - counts_T
    stems = np.flatnonzero(counts_T > 1)
    places = by_row[counts_T[rows_N[by_row]] > 1]
    stem_starts = np.append(0, np.cumsum(counts_T[stems]))
    return Segments(
        on_q, on_k, longest_q, longest_k, on_device(rows_N), on_device(by_row[first_T]), on_device(stems),
        on_device(places), on_device(stem_starts),
    )  # fmt: skip
