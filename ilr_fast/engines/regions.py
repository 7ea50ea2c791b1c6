"""Device memory that an engine gives back and later takes again at the same addresses.

CUDA graphs and views hold addresses. A region reserves addresses once and maps physical memory under them, so that the
memory can go (`release`) and come (`restore`) while everything that points there stays valid:

    region = Region(device)
    with region.filling():
        weights = torch.empty(…)        # and all else that torch allocates here
    region.release(keep=True)           # copied to the host, the device's memory is free for others
    region.restore()                    # the same bits at the same place

`keep=False` copies nothing out, and `restore` gives zeros. Tensors that are said to be `steady` are copied out once,
and again only after `changed()`.
Reading or writing a tensor of a region that is released is an illegal access, from which a process does not recover.

The primitives are vLLM's (`vllm.device_allocator.cumem`: CUDA's virtual memory calls behind a torch memory pool). Its
own sleep mode is one for a whole process and always copies the weights; here several engines of one process each have
regions. The pools' callbacks belong to the process: vLLM's own `CuMemAllocator` must not be used beside this.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ilr_fast.engines.device_memory import CudaDriver, Driver, Handle, OutOfMemory, pinned


@dataclass(slots=True, eq=False)
class _Segment:
    """What torch took at once.

    `moves`: whether it can be released; `steady`: whether it changes only where that is said; `copied`: whether the
    host's copy is good; `dead`: nothing in it is used any more.
    """

    handle: Handle
    driver: Driver
    mapped: bool = True
    moves: bool = True
    steady: bool = False
    copied: bool = False
    dead: bool = False

    @property
    def address(self) -> int:
        return self.handle[2]

    @property
    def size(self) -> int:
        return self.handle[1]

    def map(self) -> None:
        self.driver.map(self.handle)
        self.mapped = True

    def unmap(self) -> None:
        self.mapped = False
        self.driver.unmap(self.handle)


class Region:
    """Segments that come and go together. `driver` None: the CUDA device's own, by vLLM."""

    def __init__(self, device: torch.device, driver: Driver | None = None):
        self._driver = driver or CudaDriver(device)
        self._segments: list[_Segment] = []
        self._pools: list[Any] = []
        self._host: torch.Tensor | None = None
        self._kept = False  # what `restore` has to bring back

    @property
    def bytes(self) -> int:
        """What `release` gives back."""
        return sum(s.size for s in self._moving())

    @property
    def resident(self) -> bool:
        """Whether the memory is there."""
        return all(s.mapped for s in self._moving())

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the region."""
        start = tensor.untyped_storage().data_ptr()
        return any(s.address <= start < s.address + s.size for s in self._segments)

    def changed(self) -> None:
        """What was copied to the host earlier is no longer what the device holds."""
        for segment in self._segments:
            segment.copied = False

    def add(self, handle: Handle) -> None:
        """Counts memory that is mapped under a handle as the region's."""
        _segments[handle[2]] = segment = _Segment(handle, self._driver)
        self._segments.append(segment)

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """While open, what torch allocates on the device lies in the region."""
        from vllm.device_allocator.cumem import use_memory_pool_with_allocator

        torch.cuda.empty_cache()  # what torch keeps of freed memory it would not give up for a pool of this kind
        with _plain_segments(), use_memory_pool_with_allocator(_taken, _freed) as (pool, allocator):
            _immortal(allocator)
            self._pools.append(pool)
            _live.add(self)
            _filling.append(self)
            try:
                yield
            finally:
                _filling.pop()
                self._drop_what_failed()
        self._driver.synchronize()
        for segment, blocks in self._snapshot():
            if not blocks:  # what only the loading took
                segment.dead = True
                segment.unmap()

    def only(self, tensors: Iterable[torch.Tensor]) -> None:
        """Of the region only segments that hold nothing but these tensors will be released; the others stay."""
        starts = {t.untyped_storage().data_ptr() for t in tensors}
        for segment, blocks in self._snapshot():
            segment.moves = bool(blocks) and blocks <= starts

    def steady(self, tensors: Iterable[torch.Tensor]) -> None:
        """Segments that hold nothing but these tensors change only where `changed` says so."""
        starts = {t.untyped_storage().data_ptr() for t in tensors}
        for segment, blocks in self._snapshot():
            segment.steady = blocks <= starts

    def release(self, *, keep: bool) -> int:
        """Gives the memory back and returns its bytes; `keep` copies to the host first what may have changed."""
        moving = [s for s in self._moving() if s.mapped]
        if not moving:
            return 0
        self._driver.synchronize()
        if keep:
            host = self._host_copy()
            for segment, place in self._places():
                if not (segment.steady and segment.copied):
                    self._driver.copy(host.data_ptr() + place, segment.address, segment.size)
                segment.copied = True
        self._kept = keep
        for segment in moving:
            segment.unmap()
        return sum(s.size for s in moving)

    def restore(self) -> int:
        """Takes the memory again and returns its bytes. OutOfMemory leaves everything released."""
        missing = [s for s in self._moving() if not s.mapped]
        for number, segment in enumerate(missing):
            try:
                segment.map()
            except RuntimeError as error:
                for done in missing[:number]:
                    done.unmap()
                raise OutOfMemory(sum(s.size for s in missing), self._driver.free()) from error
        if not missing:
            return 0
        if self._kept:
            assert self._host is not None, "what was kept is there"
            for segment, place in self._places():
                self._driver.copy(segment.address, self._host.data_ptr() + place, segment.size)
        else:
            for segment in missing:
                self._driver.zero(segment.address, segment.size)
        self._driver.synchronize()
        return sum(s.size for s in missing)

    def _drop_what_failed(self) -> None:
        """Segments that torch did not get, for lack of memory: nothing is mapped under their addresses."""
        got = {found["address"] for pool in self._pools for found in pool.snapshot()}
        failed = [s for s in self._segments if not s.dead and not (s.address in got and _segments[s.address] is s)]
        for segment in failed:
            self._segments.remove(segment)
            if _segments.get(segment.address) is segment:
                del _segments[segment.address]
        if failed:
            self._driver.forget_failure()

    def _moving(self) -> list[_Segment]:
        return [s for s in self._segments if s.moves and not s.dead]

    def _places(self) -> Iterator[tuple[_Segment, int]]:
        """Each segment and where it lies in the host's copy."""
        place = 0
        for segment in self._moving():
            yield segment, place
            place += segment.size

    def _host_copy(self) -> torch.Tensor:
        if self._host is None:
            self._host = pinned(self.bytes)
        return self._host

    def _snapshot(self) -> Iterator[tuple[_Segment, set[int]]]:
        """Each segment with the addresses of what is used in it."""
        for pool in self._pools:
            for found in pool.snapshot():
                segment = _segments.get(found["address"])
                if segment is not None and not segment.dead:
                    blocks = [b for b in found["blocks"] if b["state"].startswith("active")]
                    yield segment, {b["address"] for b in blocks}


def bytes_away() -> int:
    """What all regions of the process have given back, and torch counts as allocated."""
    return sum(s.size for s in _segments.values() if not s.mapped and not s.dead)


_segments: dict[int, _Segment] = {}  # of the process, by address
_filling: list[Region] = []  # the innermost last
_live: weakref.WeakSet[Region] = weakref.WeakSet()


def _taken(handle: Handle) -> None:
    """torch takes a segment, which is mapped right after this."""
    _filling[-1].add(handle)


def _freed(address: int) -> Handle:
    """torch frees a segment, whose memory is unmapped right after this: it must be there. Nothing may be raised."""
    segment = _segments.pop(address)
    with contextlib.suppress(RuntimeError):
        segment.driver.synchronize()
        if not segment.mapped:
            segment.driver.map(segment.handle)
    segment.mapped, segment.dead = False, True
    return segment.handle


@contextlib.contextmanager
def _plain_segments() -> Iterator[None]:
    """torch's expandable segments, where they are set, can't be used in a pool with an allocator of its own."""
    name = next((n for n in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if n in os.environ), "")
    settings = os.environ.get(name, "")
    if "expandable_segments:True" not in settings:
        yield
        return
    change: Callable[[str], None] = torch.cuda.memory._set_allocator_settings
    change(settings.replace("expandable_segments:True", "expandable_segments:False"))
    try:
        yield
    finally:
        change(settings)


def _immortal(thing: object) -> None:
    """torch's pools point to their allocators and do not own them: what is never destroyed is never missed."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


@atexit.register
def _leave() -> None:
    """Pools that are left at the end would call back into an interpreter that is gone."""
    gc.collect()
    for region in list(_live):
        for pool in region._pools:
            _immortal(pool)
