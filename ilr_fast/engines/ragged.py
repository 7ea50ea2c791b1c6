"""The attention of one engine step by one ragged kernel a layer: prompts and decoding rows together.

On a GPU a step of a small model is bound by the number of kernels that are started. So where torch's variable-length
flash kernel runs, no sequence has a call of its own: the keys of all slots in use are gathered, [N, K, D], and every
sequence's new tokens are a run of queries aligned at its last key. Prefixes that slots share are copied by one
gather and one scatter, whatever their number.

    reads = RaggedReads(pieces, copies, device)          # once a step
    reads.copy_prefixes(keys)                            # keys [slots, K, capacity, D], in place
    out_THD = reads.attend(query_THD, keys, values, settings, kernel)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ilr_fast.attention import AttentionSettings
from ilr_fast.engines.slots import Copy, Piece
from ilr_fast.flash_attention import RaggedKernel
from ilr_fast.segments import Segments


class RaggedReads:
    """Index tensors of a step; `pieces` in packed order."""

    def __init__(self, pieces: Sequence[Piece], copies: Sequence[Copy], device: torch.device):
        lengths = np.array([p.past + p.new for p in pieces])
        slot_N = np.repeat([p.slot for p in pieces], lengths)
        place_N = np.concatenate([np.arange(n) for n in lengths])
        source_M, target_M, place_M = _flattened(copies)
        starts = np.zeros((2, len(pieces) + 1), dtype=np.int64)
        starts[0, 1:], starts[1, 1:] = np.cumsum([p.new for p in pieces]), np.cumsum(lengths)
        parts = [slot_N, place_N, source_M, target_M, place_M]
        all_ = torch.from_numpy(np.concatenate(parts)).to(device)  # one transfer
        self._slot_N, self._place_N, *self._copied = all_.split([len(part) for part in parts])
        starts_q, starts_k = torch.from_numpy(starts.astype(np.int32)).to(device)
        longest_q, longest_k = max(p.new for p in pieces), int(lengths.max())
        self._segments = Segments(starts_q, starts_k, longest_q, longest_k, None, None, None)

    def copy_prefixes(self, cache: Tensor) -> None:
        """Copies the step's shared prefixes within one layer's keys, or values, [slots, K, capacity, D]."""
        source_M, target_M, place_M = self._copied
        if len(source_M):
            cache[target_M, :, place_M] = cache[source_M, :, place_M]

    def attend(
        self, query_THD: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings, kernel: RaggedKernel
    ) -> Tensor:
        """New tokens' queries over one layer's keys and values [slots, K, capacity, D] → [T, H, D]."""
        window = settings.window
        if window is not None and window >= self._segments.longest_k:
            window = None
        key_NKD, value_NKD = (x[self._slot_N, :, self._place_N] for x in (keys, values))
        return kernel.forward(query_THD, key_NKD, value_NKD, self._segments, settings.scale, window)[0]


def _flattened(copies: Sequence[Copy]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source, target, place) of every token of copies that are made one after the other, as if made all at once.

    A slot may be copied from that is itself copied to before: its tokens then come from where they came from.
    """
    origins: dict[int, np.ndarray] = {}
    for copy in copies:
        origin = np.full(copy.length, copy.source)
        known = origins.get(copy.source, origin[:0])[: copy.length]
        origin[: len(known)] = known
        origins |= dict.fromkeys(copy.targets, origin)
    none = np.zeros(0, dtype=np.int64)
    source_M = np.concatenate([none, *origins.values()])
    target_M = np.concatenate([none, *(np.full(len(origin), slot) for slot, origin in origins.items())])
    return source_M, target_M, np.concatenate([none, *(np.arange(len(origin)) for origin in origins.values())])
