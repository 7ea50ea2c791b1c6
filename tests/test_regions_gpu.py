"""Memory of a GPU that is given back and taken again under CUDA graphs, and that no process leaves behind."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore"),
]
MIB = 2**20
SIZE = 96 * MIB


@pytest.fixture()
def region():
    pytest.importorskip("vllm.device_allocator.cumem")
    from ilr_fast.engines.regions import Region

    return Region(torch.device("cuda"))


def free() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_a_graph_over_memory_that_was_away(region):
    with region.filling():
        weights = torch.randint(-9, 9, (SIZE // 4,), device="cuda", dtype=torch.int32)
        small = torch.arange(1000, device="cuda")
    total = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.copy_(weights.sum() + small.sum())
    graph.replay()
    expected, kept, address, before = int(total), weights.cpu(), weights.data_ptr(), free()
    assert region.release(keep=True) >= SIZE and free() >= before + SIZE and not region.resident
    other = torch.full((SIZE // 4,), 7, device="cuda", dtype=torch.int32)  # somebody else uses the memory
    assert region.restore() >= SIZE and weights.data_ptr() == address and torch.equal(weights.cpu(), kept)
    total.zero_()
    graph.replay()
    assert int(total) == expected and int(other.sum()) == 7 * (SIZE // 4)
    region.steady([weights])
    weights[0] += 5
    small += 1
    region.release(keep=True)
    region.restore()
    assert torch.equal(weights.cpu(), kept), "a copy that is good is not made again"
    assert torch.equal(small.cpu(), torch.arange(1, 1001)), "what may change is copied every time"
    weights[0] += 5
    region.changed()
    region.release(keep=True)
    region.restore()
    assert int(weights[0]) == int(kept[0]) + 5


def test_what_is_not_kept_comes_back_as_zeros_and_the_rest_stays(region):
    with region.filling():
        cache = torch.ones(SIZE, dtype=torch.uint8, device="cuda")
        other = torch.full((3 * MIB,), 3, dtype=torch.uint8, device="cuda")
    region.only([cache])
    assert SIZE <= region.bytes < SIZE + 3 * MIB
    region.release(keep=False)
    assert int(other.sum()) == 9 * MIB
    region.restore()
    assert int(cache.max()) == 0 and int(other.sum()) == 9 * MIB


def test_a_region_that_the_card_has_no_room_for_leaves_nothing_behind(region):
    kept = torch.empty(SIZE, dtype=torch.uint8, device="cuda")
    del kept  # torch keeps it, and vLLM's allocator could not ask for it
    with pytest.raises(torch.OutOfMemoryError), region.filling():
        torch.empty(torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda")
    assert region.bytes == 0 and region.release(keep=True) == 0
    with region.filling():
        weights = torch.full((SIZE,), 5, dtype=torch.uint8, device="cuda")
    region.release(keep=True)
    region.restore()
    assert int(weights.min()) == int(weights.max()) == 5


def test_no_memory_to_wake_into_is_said_and_can_be_tried_again(region):
    from ilr_fast.engines.device_memory import OutOfMemory

    with region.filling():
        parts = [torch.full((SIZE,), n, dtype=torch.uint8, device="cuda") for n in range(3)]
    region.release(keep=True)
    ballast = torch.empty(free() - 2 * SIZE, dtype=torch.uint8, device="cuda")
    before = free()
    with pytest.raises(OutOfMemory, match=r"0\.28\d* GiB are needed"):
        region.restore()
    assert not region.resident and abs(free() - before) < MIB
    del ballast
    free()
    region.restore()
    assert [int(p[-1]) for p in parts] == [0, 1, 2]


def test_memory_is_freed_with_the_tensors_asleep_or_not(region):
    before = free()
    with region.filling():
        awake = torch.ones(SIZE, dtype=torch.uint8, device="cuda")
    region.release(keep=False)
    del awake, region
    import gc

    gc.collect()
    assert free() >= before - 2 * MIB


def test_a_killed_worker_leaves_no_memory_behind(tmp_path):
    from end_to_end import agent, save_models, write_config

    from ilr_fast.config_parse import load_config
    from ilr_fast.hosts import HostLost
    from ilr_fast.team import open_team, prepare_chats

    models = save_models(tmp_path)
    agents = {"ada": {**agent(models), "device": "cuda", "host": "process"}}
    config = load_config(str(write_config(tmp_path, models, agents=agents, protocol="single", deterministic=False)))
    before = free()
    with open_team(config, prepare_chats(config), logs=tmp_path / "logs") as team:
        (ada,) = team.hosts.values()
        pid = int(ada.pid)
        assert free() < before - 100 * MIB, "its context takes memory"
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(HostLost, match="killed by SIGKILL"):
            while True:
                ada.stats()
        assert time.monotonic() - killed < 10
    until = time.monotonic() + 10
    while free() < before - 4 * MIB and time.monotonic() < until:
        time.sleep(0.1)
    assert free() >= before - 4 * MIB and not os.path.exists(f"/proc/{pid}")
