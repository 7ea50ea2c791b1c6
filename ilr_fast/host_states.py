"""AdamW's states in the host's memory, passed through the device in buckets: a few hundred MiB on the GPU, not 12 bytes
a parameter.

All states of one kind (means, squares, float32 copies) lie one after the other in one block of page-locked memory, as
views of which every parameter has its own; a bucket is a range of that block. While a bucket is worked on, the next is
on its way in and the last on its way out, on a stream each:

    in        0   1   2   3
    compute       0   1   2   3
    out               0   1   2   3

    states = HostStates(parameters, {"mean": torch.bfloat16, "square": torch.bfloat16})
    states.sweep(lambda pieces: adamw_step_(...))

On a CPU the same buckets pass through buffers too, so the path is the same one. Bits are those of states that stay on
the device: every number is worked on by the same formula, and random numbers depend on a number's place alone.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNED = 16  # numbers; what the kernel wants states to begin at, in bytes, for the narrowest of them
BUCKET_BYTES = 2**27  # of all kinds of states together
STAGES = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """Numbers start:stop of the flattened parameter `index`; `states` are the bucket's, on the device, by kind."""

    index: int
    start: int
    stop: int
    states: Mapping[str, Tensor]

    def of(self, whole: Tensor) -> Tensor:
        """The same numbers of a tensor of the parameter's size, contiguous in memory."""
        return whole.detach().view(-1)[self.start : self.stop]


class HostStates:
    """States of `kinds` (dtype by name) for `parameters`, zeros at first. `bucket_bytes`: of all kinds together."""

    def __init__(
        self, parameters: Sequence[Tensor], kinds: Mapping[str, torch.dtype], bucket_bytes: int = BUCKET_BYTES
    ):
        self._parameters, self.kinds = parameters, dict(kinds)
        self._device = parameters[0].device if parameters else torch.device("cpu")
        number = sum(dtype.itemsize for dtype in self.kinds.values())
        self._bucket = max(ALIGNED, bucket_bytes // number // ALIGNED * ALIGNED)
        self._starts, total = [], 0
        for parameter in parameters:
            self._starts.append(total)
            total += -(-parameter.numel() // ALIGNED) * ALIGNED
        self._total = total
        self._blocks = {kind: torch.zeros(max(1, total), dtype=dtype) for kind, dtype in self.kinds.items()}
        if self._device.type == "cuda":
            _lock(self, list(self._blocks.values()))

    def of(self, kind: str) -> list[Tensor]:
        """Each parameter's state of a kind, in the parameter's shape: views of what is kept."""
        block = self._blocks[kind]
        return [
            block[start : start + p.numel()].view(p.shape)
            for start, p in zip(self._starts, self._parameters, strict=True)
        ]

    def sweep(self, work: Callable[[Sequence[Piece]], Any], wanted: Sequence[bool] | None = None) -> None:
        """Calls `work` with the pieces of each bucket, whose states it changes in place; `wanted` parameters alone.

        `work` must only start what it does on the current stream. Returns when the states are back.
        """
        buckets = [pieces for pieces in self._split(wanted) if pieces]
        lanes = _Lanes(self, min(STAGES, len(buckets)))
        for number, places in enumerate(buckets[: STAGES - 1]):
            lanes.bring(number, places)
        for number, places in enumerate(buckets):
            if number + STAGES - 1 < len(buckets):
                lanes.bring(number + STAGES - 1, buckets[number + STAGES - 1])
            work(lanes.pieces(number, places))
            lanes.take_back(number, places)
        lanes.finish()

    def _split(self, wanted: Sequence[bool] | None) -> list[list[tuple[int, int, int]]]:
        """By bucket, (parameter, first, end) of the numbers in it."""
        buckets: list[list[tuple[int, int, int]]] = [[] for _ in range(-(-self._total // self._bucket))]
        for index, (begin, parameter) in enumerate(zip(self._starts, self._parameters, strict=True)):
            at, end = begin, begin + parameter.numel()
            while at < end and (wanted is None or wanted[index]):
                bucket = at // self._bucket
                stop = min(end, (bucket + 1) * self._bucket)
                buckets[bucket].append((index, at - begin, stop - begin))
                at = stop
        return buckets


class _Lanes:
    """The buffers on the device, and the streams that fill and empty them. On a CPU all happens at once, in order."""

    def __init__(self, states: HostStates, count: int):
        self._states, self._cuda = states, states._device.type == "cuda"
        self._buffers = [
            {kind: torch.empty(states._bucket, dtype=dtype, device=states._device) for kind, dtype in states.kinds.items()}
            for _ in range(count)
        ]  # fmt: skip
        if self._cuda:
            device = states._device
            self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
            current = torch.cuda.current_stream(device)
            self._in.wait_stream(current)  # the buffers are the current stream's until here
            self._filled = [torch.cuda.Event() for _ in range(count)]
            self._emptied: list[torch.cuda.Event | None] = [None] * count

    def bring(self, number: int, places: Sequence[tuple[int, int, int]]) -> None:
        lane = number % len(self._buffers)
        if not self._cuda:
            self._copy(lane, places, inwards=True)
            return
        if (emptied := self._emptied[lane]) is not None:
            self._in.wait_event(emptied)
        with torch.cuda.stream(self._in):
            self._copy(lane, places, inwards=True)
            self._filled[lane].record(self._in)

    def pieces(self, number: int, places: Sequence[tuple[int, int, int]]) -> list[Piece]:
        lane = number % len(self._buffers)
        if self._cuda:
            torch.cuda.current_stream(self._states._device).wait_event(self._filled[lane])
        return [
            Piece(index, start, stop, {kind: buffer[self._span(place)] for kind, buffer in self._buffers[lane].items()})
            for place in places for index, start, stop in [place]
        ]  # fmt: skip

    def take_back(self, number: int, places: Sequence[tuple[int, int, int]]) -> None:
        lane = number % len(self._buffers)
        if not self._cuda:
            self._copy(lane, places, inwards=False)
            return
        self._out.wait_stream(torch.cuda.current_stream(self._states._device))
        with torch.cuda.stream(self._out):
            self._copy(lane, places, inwards=False)
            emptied = torch.cuda.Event()
            emptied.record(self._out)
        self._emptied[lane] = emptied

    def finish(self) -> None:
        """Waits until all is back: the host may read the states then, and the buffers may be freed."""
        if self._cuda:
            self._out.synchronize()

    def _span(self, place: tuple[int, int, int]) -> slice:
        """Where a piece lies in its bucket's buffer."""
        index, start, stop = place
        first = (self._states._starts[index] + start) % self._states._bucket
        return slice(first, first + stop - start)

    def _copy(self, lane: int, places: Sequence[tuple[int, int, int]], *, inwards: bool) -> None:
        """A copy for each run of neighbouring pieces: what lies between them is padding."""
        begin = self._states._starts
        for run in _runs(places, begin):
            start = begin[run[0][0]] + run[0][1]
            end = begin[run[-1][0]] + run[-1][2]
            offset = start % self._states._bucket
            for kind, buffer in self._buffers[lane].items():
                here, there = buffer[offset : offset + end - start], self._states._blocks[kind][start:end]
                (here if inwards else there).copy_(there if inwards else here, non_blocking=True)


def _runs(places: Sequence[tuple[int, int, int]], begin: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """Neighbouring parameters together; a parameter that is left out begins a new run."""
    runs: list[list[tuple[int, int, int]]] = []
    for place in places:
        if runs and place[0] == runs[-1][-1][0] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _lock(owner: HostStates, blocks: list[Tensor]) -> None:
    """Locks the blocks' pages, so that copies run beside the GPU's work, for as long as `owner` lives.

    Registered rather than allocated as pinned memory, which PyTorch rounds up to a power of two.
    """
    runtime = torch.cuda.cudart()
    refused = [b for b in blocks if int(runtime.cudaHostRegister(b.data_ptr(), b.nbytes, 0)) != 0]
    if refused:
        size = sum(block.nbytes for block in refused) / 2**30
        _log.warning("%.1f GiB of AdamW's states can't be page-locked (ulimit -l): its steps take longer", size)
    weakref.finalize(owner, _unlock, [block for block in blocks if all(block is not r for r in refused)])


def _unlock(blocks: list[Tensor]) -> None:
    for block in blocks:
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
