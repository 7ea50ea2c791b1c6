"""Tensors of a trainer whose memory waits in the host's, for agents that take turns on a device.

    parked = Parked(changing=lambda: model.parameters(), frozen=lambda: reference.parameters())
    parked.leave()      # the storages are empty, their memory is free
    parked.come_back()  # the same bits; tensors and views are the same objects, their addresses may differ

Nothing may read the tensors in between. What is frozen is copied out once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from ilr_fast.engines.device_memory import OutOfMemory, pinned

ALIGNED = 256  # bytes
Tensors = Callable[[], Iterable[Tensor]]


class Parked:
    """The storages of the tensors that `changing` and `frozen` give whenever they leave."""

    def __init__(self, changing: Tensors, frozen: Tensors = lambda: ()):
        self._changing, self._frozen = changing, frozen
        self._copies: dict[int, tuple[UntypedStorage, Tensor]] = {}  # by the storage's identity, kept for the next time
        self._away: list[int] = []

    @torch.no_grad()
    def leave(self) -> int:
        """Copies them to the host and frees their memory; returns its bytes. OutOfMemory where the host has too little.

        Those that have left already stay as they are.
        """
        freed, known, seen = 0, self._copies, set(self._away)
        self._copies = {key: known[key] for key in self._away}
        leaving: dict[int, tuple[UntypedStorage, bool]] = {}
        for frozen, tensors in ((False, self._changing()), (True, self._frozen())):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage._cdata not in seen:
                    leaving.setdefault(storage._cdata, (storage, frozen))
        fresh = _blocks({key: storage.nbytes() for key, (storage, _) in leaving.items() if key not in known})
        for key, (storage, frozen) in leaving.items():
            copy = fresh[key] if key in fresh else known[key][1]
            if key in fresh or not frozen:
                copy.copy_(_bytes(storage))
            self._copies[key] = storage, copy
            self._away.append(key)
            freed += storage.nbytes()
            storage.resize_(0)
        return freed

    @torch.no_grad()
    def come_back(self) -> int:
        """Takes memory and copies them in; returns the bytes. OutOfMemory leaves the rest parked."""
        taken = 0
        while self._away:
            storage, copy = self._copies[self._away[-1]]
            try:
                storage.resize_(copy.numel())
            except torch.OutOfMemoryError as error:
                needed = sum(self._copies[key][1].numel() for key in self._away)
                raise OutOfMemory(needed, torch.cuda.mem_get_info(storage.device)[0]) from error
            _bytes(storage).copy_(copy)
            taken += copy.numel()
            self._away.pop()
        return taken


def _blocks(sizes: dict[int, int]) -> dict[int, Tensor]:
    """Room in the host's memory for each, of one block: to lock many small ones takes seconds."""
    if not sizes:
        return {}
    block, found, place = pinned(sum(-(-size // ALIGNED) * ALIGNED for size in sizes.values())), {}, 0
    for key, size in sizes.items():
        found[key] = block[place : place + size]
        place += -(-size // ALIGNED) * ALIGNED
    return found


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def tensors_in(state: Any) -> Iterator[Tensor]:
    """All tensors of nested dicts and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_in(value)
