"""Memory that is given back and taken again: the bookkeeping with a device that is a dictionary, and parked tensors."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest
import torch

from ilr_fast.engines import device_memory, regions
from ilr_fast.engines.device_memory import OutOfMemory
from ilr_fast.engines.regions import Region
from ilr_fast.parked import Parked, tensors_in


class FakeDevice:
    """Memory by address; `room` bytes of it in all. Copies go between it and the host's real memory."""

    def __init__(self, room: int):
        self.room, self.memory, self.copied = room, {}, []

    def map(self, handle):
        _, size, address, _ = handle
        if self.free() < size:
            raise RuntimeError("CUDA Error: out of memory")
        assert address not in self.memory
        self.memory[address] = bytearray(b"\xee" * size)

    def unmap(self, handle):
        del self.memory[handle[2]]

    def copy(self, to, source, size):
        if source in self.memory:
            ctypes.memmove(to, bytes(self.memory[source]), size)
            self.copied.append(source)
        else:
            self.memory[to][:] = ctypes.string_at(source, size)

    def zero(self, address, size):
        self.memory[address][:] = bytes(size)

    def synchronize(self):
        pass

    def free(self):
        return self.room - sum(map(len, self.memory.values()))


@pytest.fixture()
def device(monkeypatch):
    monkeypatch.setattr(regions, "_segments", {})
    return FakeDevice(100)


def made(device: FakeDevice, *sizes: int, start: int = 1000) -> Region:
    region = Region(torch.device("cpu"), device)
    for number, size in enumerate(sizes):
        handle = (0, size, start + 100 * number, 0)
        region.add(handle)
        device.map(handle)
        device.memory[handle[2]][:] = bytes([number + 1]) * size
    return region


def test_what_is_kept_comes_back_and_what_is_not_is_zero(device):
    weights, cache = made(device, 30, 20), made(device, 40, start=5000)
    assert (weights.bytes, cache.bytes, device.free()) == (50, 40, 10) and weights.resident
    assert weights.release(keep=True) == 50 and cache.release(keep=False) == 40
    assert device.free() == 100 and not weights.resident and weights.release(keep=True) == 0
    assert regions.bytes_away() == 90
    assert weights.restore() == 50 and cache.restore() == 40 and weights.restore() == 0
    assert regions.bytes_away() == 0
    assert device.memory == {1000: b"\1" * 30, 1100: b"\2" * 20, 5000: bytes(40)}


def test_steady_memory_is_copied_out_once_and_again_when_it_has_changed(device):
    region = made(device, 30, 20)
    region._segments[0].steady = True
    for _ in range(2):
        region.release(keep=True)
        region.restore()
    assert device.copied == [1000, 1100, 1100]
    device.memory[1000][:] = b"\7" * 30
    region.changed()
    region.release(keep=True)
    region.restore()
    assert device.copied[3:] == [1000, 1100] and device.memory[1000] == b"\7" * 30


def test_without_memory_nothing_is_half_there(device):
    region = made(device, 30, 20, 40)
    region.release(keep=True)
    other = made(device, 30, start=9000)
    with pytest.raises(OutOfMemory, match="are needed"):
        region.restore()
    assert device.free() == 70 and not region.resident
    other.release(keep=False)
    region.restore()
    assert [device.memory[a][0] for a in (1000, 1100, 1200)] == [1, 2, 3]


def test_segments_that_must_stay_do(device):
    region = made(device, 30, 20)
    region._segments[1].moves = False
    assert region.bytes == 30 and region.release(keep=False) == 30 and list(device.memory) == [1100]
    region.restore()
    assert device.memory == {1000: bytes(30), 1100: b"\2" * 20}


def test_torch_frees_a_segment_that_is_away_without_an_error(device):
    region = made(device, 30, 20)
    region.release(keep=True)
    for address in (1000, 1100):
        device.unmap(regions._freed(address))  # as the allocator does after it has asked
    assert not device.memory and region.bytes == 0 and region.restore() == 0


def test_too_little_host_memory_is_said(device, monkeypatch):
    monkeypatch.setattr(device_memory, "available_host_memory", lambda: 49)
    region = made(device, 30, 20)
    with pytest.raises(OutOfMemory, match="host"):
        region.release(keep=True)
    assert region.resident and device.memory[1000] == b"\1" * 30


def test_parked_tensors_come_back_as_the_same_objects():
    torch.manual_seed(0)
    weight, base = torch.nn.Parameter(torch.randn(8, 4)), torch.randn(5)
    view, state = weight.data[2:4], {"means": [torch.randn(3)], "step": 1}
    kept = [t.detach().clone() for t in (weight, base, view, *tensors_in(state))]
    parked = Parked(lambda: [weight, view, *tensors_in(state)], lambda: [base])
    assert parked.leave() == 4 * (32 + 3 + 5) and parked.leave() == 0
    assert all(t.untyped_storage().nbytes() == 0 for t in (weight, base, view, *tensors_in(state)))
    assert parked.come_back() == 4 * (32 + 3 + 5) and parked.come_back() == 0
    for tensor, before in zip((weight, base, view, *tensors_in(state)), kept, strict=True):
        assert torch.equal(tensor, before)
    with torch.no_grad():
        weight.add_(1)
        base.add_(1)  # it is said to be frozen
    parked.leave()
    parked.come_back()
    assert torch.equal(weight, kept[0] + 1) and torch.equal(view, kept[2] + 1) and torch.equal(base, kept[1])


def test_a_control_group_s_limit_counts(tmp_path):
    assert device_memory.group_memory(tmp_path) == sys.maxsize
    for name, text in (("memory.current", "700\n"), ("memory.stat", "anon 500\ninactive_file 200\n")):
        (tmp_path / name).write_text(text)
    for limit, left in (("1000\n", 500), ("max\n", sys.maxsize)):
        (tmp_path / "memory.max").write_text(limit)
        assert device_memory.group_memory(tmp_path) == left
    assert 0 < device_memory.available_host_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
