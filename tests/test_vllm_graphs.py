"""Which CUDA graph a step replays once those with prompts are whole, by vLLM's rules, and what attention is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

SLOTS = 8
SIZES = [1, 2, 4, 8, 72, 136]


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of vLLM's class, with what choosing a graph needs."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    from ilr_fast.engines import vllm_graphs

    monkeypatch.setattr(vllm_graphs, "_attends_by_flash_3", lambda config: config.flash_3)

    def made(flash_3: bool = True) -> Any:
        one: Any = object.__new__(vllm_graphs._whole(ModelCudaGraphManager))
        sizes = SimpleNamespace(cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=SIZES[-1])
        config = SimpleNamespace(
            flash_3=flash_3, speculative_config=None, cache_config=SimpleNamespace(use_kda_recoverssm=False),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=512),
        )  # fmt: skip
        vars(one).update(
            compilation_config=sizes, vllm_config=config, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
            max_num_reqs=SLOTS, decode_query_len=1, lora_capture_cases=[0], varlen_decode=False, ubatch_runner=None,
            _lora_dispatch_map={}, _max_lora_case=0, _candidates={}, _capture_descs={}, _graphs_captured=True,
        )  # fmt: skip
        one._init_candidates()
        return one

    return made


def chosen(manager: Any, queries: list[int]) -> Any:
    """For requests of so many tokens each."""
    uniform = queries[0] if len(set(queries)) == 1 else None
    return manager.dispatch(len(queries), sum(queries), uniform, 0)


@pytest.mark.parametrize("queries", [[1], [1] * 3, [1] * 8])
def test_steps_that_decode_have_the_graphs_they_had(manager: Any, queries: list[int]) -> None:
    assert chosen(manager(), queries) == chosen(manager(flash_3=False), queries)
    assert chosen(manager(), queries).uniform_token_count == 1


@pytest.mark.parametrize("queries", [[2], [1, 2], [1, 1, 1, 2], [1, 6], [4, 4], [1, 1, 1, 1, 1, 1, 1, 60], [16] * 8])
def test_steps_with_prompts_have_whole_graphs_that_hold_them(manager: Any, queries: list[int]) -> None:
    from vllm.config import CUDAGraphMode

    whole, pieces = chosen(manager(), queries), chosen(manager(flash_3=False), queries)
    assert (pieces.cg_mode, whole.cg_mode) == (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL)
    assert whole.num_tokens == pieces.num_tokens and whole.num_reqs >= len(queries)
    assert whole.uniform_token_count is None and whole in manager()._capture_descs[CUDAGraphMode.FULL]
    assert -(-whole.num_tokens // whole.num_reqs) > 1, "captured with a query of several tokens, as it is replayed"


def test_all_graphs_are_captured_once_the_largest_first(manager: Any) -> None:
    from vllm.config import CUDAGraphMode

    one = manager()
    (mode,) = one._capture_descs
    found = one._capture_descs[mode]
    assert mode == CUDAGraphMode.FULL and len(set(found)) == len(found) == 4 + 5
    assert [d.num_tokens for d in found] == sorted((d.num_tokens for d in found), reverse=True)
    assert CUDAGraphMode.PIECEWISE in manager(flash_3=False)._capture_descs
    assert chosen(one, [1, 300]).cg_mode == CUDAGraphMode.NONE


def test_attention_is_planned_alike_for_every_replay(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest query counts as one or as the longest there can be; splits follow from it and the requests."""
    from vllm.v1.worker.gpu import cudagraph_utils

    told = []
    builder = SimpleNamespace(max_num_splits=32, device=None, num_heads_kv=2)
    builder.build = lambda prefix, common, **_: told.append((common.max_query_len, builder.max_num_splits))
    group = SimpleNamespace(get_metadata_builder=lambda _: builder)
    card = SimpleNamespace(multi_processor_count=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(cudagraph_utils.ModelCudaGraphManager, "capture", lambda self, a, *, attn_groups: None)
    common = SimpleNamespace(num_reqs=14, max_query_len=1)
    monkeypatch.setattr("ilr_fast.engines.vllm_graphs.replace", lambda one, **new: SimpleNamespace(**(vars(one) | new)))

    manager(flash_3=False).capture(None, attn_groups=[[group]])
    builder.build(0, SimpleNamespace(num_reqs=15, max_query_len=7))
    assert told.pop() == (7, 32)
    manager().capture(None, attn_groups=[[group]])
    builder.build(0, common)
    builder.build(0, SimpleNamespace(num_reqs=15, max_query_len=7))
    builder.build(0, SimpleNamespace(num_reqs=14, max_query_len=300))
    builder.build(0, SimpleNamespace(num_reqs=15, max_query_len=1))
    assert told == [(1, 32), (512, 1), (512, 1), (1, 1)]
