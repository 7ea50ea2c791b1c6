"""Keys and values by slot, and the attention of one packed forward pass over them.

Each layer holds one tensor of keys and one of values, [slots, K, capacity, D]; both grow with what is used, in slots
and in tokens. `CachePlan` is the attention plan (see attention.py) of one step: every layer first writes the new
tokens' keys and values to their slots, then copies the prefixes that slots share, then lets each sequence attend to its
slot. So even a prefix that is computed in this very step is computed once.

Where torch's ragged flash kernel runs, all sequences are attended to by one call (ragged.py). Elsewhere those with one
new token (decoding) are attended to together, by ranges of neighbouring slots read in place; each longer piece (a
prompt) by one call of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ilr_fast.attention import AttentionSettings, block_attention
from ilr_fast.engines.ragged import RaggedReads
from ilr_fast.engines.slots import Copy, Piece
from ilr_fast.flash_attention import RaggedKernel, kernel_fits, torch_kernel

GROW_TOKENS = 64
RANGE_OVERHEAD = 400  # keys of one slot that cost as much as one more range (measured with SmolLM2's heads)


class SlotCache:
    """The tensors. They appear at a layer's first write, with that layer's heads, dtype and device."""

    def __init__(self, max_slots: int, max_tokens: int | None = None) -> None:
        self.max_slots, self.max_tokens = max_slots, max_tokens
        self.slots = 0
        self.capacity = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def release(self) -> None:
        """Gives the memory back."""
        self._layers.clear()
        self.slots = self.capacity = 0

    def reserve(self, slots: int, capacity: int) -> None:
        """Makes room for slots 0 … slots − 1 with `capacity` tokens each; what is there is kept."""
        if slots <= self.slots and capacity <= self.capacity:
            return
        if slots > self.slots:
            slots = min(max(slots, 2 * self.slots), max(self.max_slots, slots))
        if capacity > self.capacity:
            ahead = min(self.capacity * 5 // 4, self.max_tokens or self.capacity * 5 // 4)
            capacity = -(-max(capacity, ahead) // GROW_TOKENS) * GROW_TOKENS
        self.slots, self.capacity = max(slots, self.slots), max(capacity, self.capacity)
        for layer, tensors in self._layers.items():
            self._layers[layer] = (self._grown(tensors[0]), self._grown(tensors[1]))

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self.slots, old.shape[1], self.capacity, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, K, capacity, D]. Zeros where nothing was written: masked garbage could be NaN."""
        if number not in self._layers:
            shape = (self.slots, like.shape[1], self.capacity, like.shape[3])
            self._layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[number]

    def bytes(self) -> int:
        """What keys and values take."""
        return sum(t.numel() * t.element_size() for tensors in self._layers.values() for t in tensors)


@dataclass(frozen=True, slots=True)
class _Range:
    """Neighbouring slots first:last with one new token each, but for idle ones between; `keys` are read of each."""

    first: int
    last: int
    keys: int
    rows: Tensor | None  # the packed row of each slot (any row for an idle slot), None where they are just `out`
    out: slice  # the packed rows
    taken: Tensor | None  # which slots of the range these are, None for all
    length_N: Tensor  # of each slot, the new token included


class CachePlan:
    """Attention of one step. `pieces` in packed order: those with one new token first, by slot, then the others.

    `kernel` attends to all of them; None: torch's own where it can, else one call for each range or piece.
    """

    def __init__(
        self,
        cache: SlotCache,
        pieces: Sequence[Piece],
        copies: Sequence[Copy],
        device: torch.device,
        kernel: RaggedKernel | None = None,
    ):
        singles = [p for p in pieces if p.new == 1]
        self._long = [p for p in pieces if p.new > 1]
        assert list(pieces) == sorted(singles, key=lambda p: p.slot) + self._long, "single tokens first, by slot"
        ends = [(p.slot, p.past + p.new) for p in pieces] + [(t, c.length) for c in copies for t in c.targets]
        cache.reserve(1 + max(slot for slot, _ in ends), max(end for _, end in ends))
        self._cache, self._device = cache, device
        self._slot_T = torch.tensor([p.slot for p in pieces for _ in range(p.new)], device=device)
        positions = [n for p in pieces for n in range(p.past, p.past + p.new)]
        self.positions_T = torch.tensor(positions, device=device)
        self._pieces, self._singles, self._copies, self._kernel = pieces, singles, copies, kernel
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """query [1, H, T, D], key and value [1, K, T, D] → [1, T, H, D]; stores the keys and values."""
        keys, values = self._cache.layer(layer, key)
        keys[self._slot_T, :, self.positions_T] = key[0].transpose(0, 1)
        values[self._slot_T, :, self.positions_T] = value[0].transpose(0, 1)
        query_THD = query[0].transpose(0, 1)
        if self._kernel or kernel_fits(query, query.shape[-1], settings.softcap, settings.dropout):
            kernel = self._kernel or torch_kernel()
            for tensor in (keys, values):
                self._reads.copy_prefixes(tensor)
            return self._reads.attend(query_THD, keys, values, settings, kernel)[None]
        for source, targets, length in self._targets:
            # Cloned: torch refuses to write to a dense tensor (length = capacity) from a part of itself.
            keys[targets, :, :length] = keys[source, :, :length].clone()
            values[targets, :, :length] = values[source, :, :length].clone()
        out_THD = torch.empty_like(query_THD, memory_format=torch.contiguous_format)
        for number, part in enumerate(self._ranges):
            self._attend_range(number, part, query_THD, keys, values, settings, out_THD)
        start = len(self._singles)
        for piece in self._long:
            end = start + piece.new
            self._attend_piece(piece, query[:, :, start:end], keys, values, settings, out_THD[start:end])
            start = end
        return out_THD[None]

    @cached_property
    def _reads(self) -> RaggedReads:
        return RaggedReads(self._pieces, self._copies, self._device)

    @cached_property
    def _targets(self) -> list[tuple[int, Tensor, int]]:
        return [(c.source, torch.tensor(c.targets, device=self._device), c.length) for c in self._copies]

    @cached_property
    def _ranges(self) -> list[_Range]:
        return [self._range(self._singles[a:b], a) for a, b in _join_neighbours(self._singles)]

    def _attend_range(
        self,
        number: int,
        part: _Range,
        query_THD: Tensor,
        keys: Tensor,
        values: Tensor,
        settings: AttentionSettings,
        out_THD: Tensor,
    ) -> None:
        """Products batched over slots and key heads: a query head group is the rows of its key head's product."""
        heads, dim = keys.shape[1], keys.shape[3]
        query_NHD = query_THD[part.out] if part.rows is None else query_THD[part.rows]
        count = part.last - part.first
        groups = query_NHD.shape[1] // heads
        flat = (count * heads, -1, dim)
        key_BLD = keys[part.first : part.last].view(flat)[:, : part.keys]
        value_BLD = values[part.first : part.last].view(flat)[:, : part.keys]
        scores = torch.bmm(query_NHD.reshape(count * heads, groups, dim) * settings.scale, key_BLD.transpose(1, 2))
        if settings.softcap is not None:
            scores = torch.tanh(scores / settings.softcap) * settings.softcap
        mask = self._range_mask(number, settings.window, scores)
        if mask is not None:
            scores.view(count, heads * groups, -1).add_(mask)
        weights = scores.softmax(-1, dtype=torch.float32).to(value_BLD.dtype)
        out_NHD = torch.bmm(weights, value_BLD).view(count, heads * groups, dim)
        out_THD[part.out] = out_NHD if part.taken is None else out_NHD[part.taken]

    def _range_mask(self, number: int, window: int | None, like: Tensor) -> Tensor | None:
        """Additive [slots, 1, keys], or None where every key is seen."""
        part = self._ranges[number]
        if window is not None and window >= part.keys:
            window = None
        key = (number, window)
        if key not in self._masks:
            place_L = torch.arange(part.keys, device=like.device)
            length_N1 = part.length_N[:, None]
            unseen_NL = place_L >= length_N1
            if window is not None:
                unseen_NL |= place_L < length_N1 - window
            mask = torch.zeros(unseen_NL.shape, dtype=like.dtype, device=like.device)
            mask.masked_fill_(unseen_NL, float("-inf"))
            self._masks[key] = mask[:, None] if bool(unseen_NL.any()) else None
        return self._masks[key]

    def _attend_piece(
        self, piece: Piece, query: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings, out_THD: Tensor
    ) -> None:
        length = piece.past + piece.new
        key = keys[piece.slot : piece.slot + 1, :, :length]
        value = values[piece.slot : piece.slot + 1, :, :length]
        mask = self._piece_mask(piece, settings.window, query)
        out_THD.copy_(block_attention(query, key, value, mask, settings)[0].transpose(0, 1))

    def _piece_mask(self, piece: Piece, window: int | None, like: Tensor) -> Tensor | None:
        """Additive [new, past + new]; None for plain causal attention."""
        length = piece.past + piece.new
        if window is not None and window >= length:
            window = None
        if window is None and piece.past == 0:
            return None
        key = (-1 - piece.slot, window)
        if key not in self._masks:
            back = torch.arange(piece.past, length, device=like.device)[:, None] - torch.arange(
                length, device=like.device
            )
            unseen = back < 0 if window is None else (back < 0) | (back >= window)
            mask = torch.zeros(unseen.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(unseen, float("-inf"))
        return self._masks[key]

    def _range(self, pieces: Sequence[Piece], start: int) -> _Range:
        first, last = pieces[0].slot, pieces[-1].slot + 1
        row_of = {p.slot: start + n for n, p in enumerate(pieces)}
        length_of = {p.slot: p.past + 1 for p in pieces}
        holes = last - first > len(pieces)
        slots = range(first, last)
        return _Range(
            first=first,
            last=last,
            keys=max(length_of.values()),
            rows=torch.tensor([row_of.get(s, start) for s in slots], device=self._device) if holes else None,
            out=slice(start, start + len(pieces)),
            taken=torch.tensor([p.slot - first for p in pieces], device=self._device) if holes else None,
            length_N=torch.tensor([length_of.get(s, 1) for s in slots], device=self._device),
        )


def _join_neighbours(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Cuts the pieces, sorted by slot, into ranges: neighbours are joined while reading to the longest is cheaper."""
    ranges: list[tuple[int, int]] = []
    for n, piece in enumerate(pieces):
        if ranges:
            start = ranges[-1][0]
            longest = max(p.past + 1 for p in pieces[start:n])
            apart = (pieces[n - 1].slot + 1 - pieces[start].slot) * longest + piece.past + 1 + RANGE_OVERHEAD
            together = (piece.slot + 1 - pieces[start].slot) * max(longest, piece.past + 1)
            if together <= apart:
                ranges[-1] = (start, n + 1)
                continue
        ranges.append((n, n + 1))
    return ranges
