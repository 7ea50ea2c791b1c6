"""AdamW's states in the host's memory, passed through the device in buckets: a few hundred MiB on the GPU, not 12 bytes
a parameter.

All states of one kind (means, squares, float32 copies) lie one after the other in one block of page-locked memory, of
which every parameter has a view; a bucket is a range of that block. While a bucket is worked on, the next is on its way
in and the last on its way out, on a stream each:

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
from ilr_kernels.adamw import CHUNK
from torch import Tensor

from ilr_fast.allocator import in_large_pages

ALIGNED = 16  # numbers; the kernel wants states to begin at multiples of 16 bytes
BUCKET_BYTES = 2**27  # of all kinds of states together
STAGES = 3

_log = logging.getLogger(__name__)


Place = tuple[int, int, int]  # a parameter's number, and the first number and the end of what is meant of it


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
        self._bucket = max(CHUNK, bucket_bytes // number // CHUNK * CHUNK)
        self._starts, total = [], 0
        for parameter in parameters:
            self._starts.append(total)
            total += -(-parameter.numel() // ALIGNED) * ALIGNED
        self._bucket = min(self._bucket, total)
        self._blocks = {
            kind: in_large_pages(torch.empty(max(1, total), dtype=dtype)).zero_() for kind, dtype in self.kinds.items()
        }
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
        buckets = self._split(wanted)
        lanes = _Lanes(self, min(STAGES, len(buckets)))
        for number, places in enumerate(buckets[: STAGES - 1]):
            lanes.bring(number, places)
        for number, places in enumerate(buckets):
            if number + STAGES - 1 < len(buckets):
                lanes.bring(number + STAGES - 1, buckets[number + STAGES - 1])
            work(lanes.pieces(number, places))
            lanes.take_back(number, places)
        lanes.finish()

    def _split(self, wanted: Sequence[bool] | None) -> list[list[Place]]:
        """By bucket, what is in it. A bucket is a range of the blocks; what is not wanted in it is not moved."""
        buckets: list[list[Place]] = []
        for index, parameter in enumerate(self._parameters):
            at, size = 0, parameter.numel()
            while at < size and (wanted is None or wanted[index]):
                used = self._starts[index] + at - self._first(buckets[-1]) if buckets else self._bucket
                room = self._bucket - used
                stop = size if size - at <= room else at + room // CHUNK * CHUNK
                if stop <= at:
                    buckets.append([])
                    stop = min(size, at + self._bucket // CHUNK * CHUNK) if size - at > self._bucket else size
                buckets[-1].append((index, at, stop))
                at = stop
        return buckets

    def _first(self, places: Sequence[Place]) -> int:
        """Where a bucket begins in the blocks."""
        return self._starts[places[0][0]] + places[0][1]


class _Lanes:
    """The buffers on the device, and the streams that fill and empty them. On a CPU all happens at once, in order."""

    def __init__(self, states: HostStates, count: int):
        self._states, self._cuda = states, states._device.type == "cuda"
        kinds, size, device = states.kinds, states._bucket, states._device
        self._buffers = [
            {kind: torch.empty(size, dtype=dtype, device=device) for kind, dtype in kinds.items()} for _ in range(count)
        ]
        if self._cuda:
            self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
            current = torch.cuda.current_stream(device)
            self._in.wait_stream(current)  # the buffers are the current stream's until here
            self._filled = [torch.cuda.Event() for _ in range(count)]
            self._emptied: list[torch.cuda.Event | None] = [None] * count

    def bring(self, number: int, places: Sequence[Place]) -> None:
        lane = number % len(self._buffers)
        if not self._cuda:
            self._copy(lane, places, inwards=True)
            return
        if (emptied := self._emptied[lane]) is not None:
            self._in.wait_event(emptied)
        with torch.cuda.stream(self._in):
            self._copy(lane, places, inwards=True)
            self._filled[lane].record(self._in)

    def pieces(self, number: int, places: Sequence[Place]) -> list[Piece]:
        lane, states = number % len(self._buffers), self._states
        if self._cuda:
            torch.cuda.current_stream(states._device).wait_event(self._filled[lane])
        found = []
        for index, start, stop in places:
            first = states._starts[index] + start - states._first(places)
            span = slice(first, first + stop - start)
            found.append(Piece(index, start, stop, {kind: x[span] for kind, x in self._buffers[lane].items()}))
        return found

    def take_back(self, number: int, places: Sequence[Place]) -> None:
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

    def _copy(self, lane: int, places: Sequence[Place], *, inwards: bool) -> None:
        """A copy for each run of neighbouring pieces: what lies between them is padding."""
        first = self._states._first(places)
        for run in _runs(places):
            start = self._states._first(run)
            end = self._states._starts[run[-1][0]] + run[-1][2]
            for kind, buffer in self._buffers[lane].items():
                here, there = buffer[start - first : end - first], self._states._blocks[kind][start:end]
                (here if inwards else there).copy_(there if inwards else here, non_blocking=True)


def _runs(places: Sequence[Place]) -> list[list[Place]]:
    """Neighbouring parameters together; one that is left out between two ends a run."""
    runs: list[list[Place]] = []
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
