"""What a checkpoint writes, copied to the host's memory first, so that updates need not wait for its files.

A GPU's tensors pass through page-locked buffers on a stream of their own. A copy to other memory (`tensor.cpu()`) lets
hardly anything else be launched while it lasts: beside it a loop of launches ran at a thousandth of its speed on an
H100, beside copies to page-locked memory at a third, for a nineteenth of the time (benchmarks/LOG.md).

    model, state = copied([model.state_dict(), optimizer.state()], device) or (None, None)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ilr_fast.engines.device_memory import available_host_memory

CHUNK = 2**26  # bytes of a buffer; there are two
ROOM = 0.5  # of the host's free memory that copies may take


def copied(trees: Sequence[Any], device: torch.device) -> list[Any] | None:
    """The same mappings, lists and tuples with copies of their tensors in the host's memory; equal tensors stay one.

    None where the device is the host, or where the host has too little memory.
    """
    if not worth_it(device) or sum(_bytes(trees).values()) > ROOM * available_host_memory():
        return None
    made: dict[Any, Tensor] = {}
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if device.type == "cuda":
            torch.cuda.synchronize()  # what wrote the tensors, on whichever stream
        lanes = _Lanes() if device.type == "cuda" else None
        return [_copied(tree, made, lanes) for tree in trees]


def worth_it(device: torch.device) -> bool:
    """Whether tensors there are written faster from a copy."""
    return device.type == "cuda"


def _bytes(tree: Any) -> dict[Any, int]:
    """Bytes of each distinct tensor."""
    if isinstance(tree, Tensor):
        return {_key(tree): tree.nbytes}
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return {key: size for part in parts for key, size in _bytes(part).items()}


def _key(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _copied(tree: Any, made: dict[Any, Tensor], lanes: _Lanes | None) -> Any:
    if isinstance(tree, Tensor):
        if _key(tree) not in made:
            made[_key(tree)] = lanes.to_host(tree) if lanes and tree.is_cuda else tree.detach().clone()
        return made[_key(tree)]
    if isinstance(tree, Mapping):
        return {key: _copied(part, made, lanes) for key, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_copied(part, made, lanes) for part in tree)
    return tree


class _Lanes:
    """Two page-locked buffers and the stream that fills them: one is emptied while the other is filled."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._filled = [torch.cuda.Event() for _ in range(2)]

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in memory that is not page-locked."""
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
        there = made.view(-1).view(torch.uint8)
        with torch.cuda.stream(self._stream):
            here = tensor.detach().contiguous().view(-1).view(torch.uint8)
            spans = [(at, min(at + CHUNK, len(here))) for at in range(0, len(here), CHUNK)]
            for number, (start, stop) in enumerate(spans):
                self._buffers[number % 2][: stop - start].copy_(here[start:stop], non_blocking=True)
                self._filled[number % 2].record(self._stream)
                if number:
                    self._empty(number - 1, spans, there)
            if spans:
                self._empty(len(spans) - 1, spans, there)
        return made

    def _empty(self, number: int, spans: Sequence[tuple[int, int]], there: Tensor) -> None:
        start, stop = spans[number]
        self._filled[number % 2].synchronize()
        there[start:stop].copy_(self._buffers[number % 2][: stop - start])
