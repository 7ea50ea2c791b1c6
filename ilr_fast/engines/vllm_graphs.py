"""Whole CUDA graphs for vLLM's steps that take in prompts, where attention is FlashAttention 3.

vLLM's graphs of such steps stop at every attention layer, whose kernels the host then launches by itself: some 9 ms of
the host for 28 layers, in which the GPU idles. FlashAttention 3 can be captured as it is for any mixture of requests:
lengths and positions are read from the device. What the host decides for it must be the same at every replay:

- the tile of queries, which follows from the longest query of a step: 64 rows where it has at most 64 of them (query
  heads that share a key head counted), else 128. Every step with prompts is planned as if it had the longest one.
- into how many parts a request's keys may be split, and a kernel that adds the parts up: one part where the requests
  fill the GPU by themselves, so that this kernel, of every layer, is not there at all; and one in steps with prompts,
  since each part takes as much memory as all queries in float32 (32 parts of 3,072 tokens of an 8B model: 1.5 GiB).

    with whole_graphs():
        client = InprocClient(…)              # its compilation_config: vllm_quick.graphs(slots)
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

FILLED = 3  # blocks of keys for every multiprocessor, from which on no request's keys are split


@contextlib.contextmanager
def whole_graphs() -> Iterator[None]:
    """While a core starts: its graphs of steps with prompts are whole where they can be."""
    from vllm.v1.worker.gpu import model_runner

    base = model_runner.ModelCudaGraphManager
    model_runner.ModelCudaGraphManager = _whole(base)
    try:
        yield
    finally:
        model_runner.ModelCudaGraphManager = base


def _whole(base: Any) -> Any:
    """vLLM's graph manager `base` with whole graphs in place of those in pieces."""

    class WholeGraphs(base):  # type: ignore[misc]
        """See the module."""

        def _init_candidates(self) -> None:
            """vLLM's graphs, those in pieces made whole."""
            from vllm.config import CUDAGraphMode

            super()._init_candidates()
            pieces = self._capture_descs.get(CUDAGraphMode.PIECEWISE, [])
            if not pieces or not _attends_by_flash_3(self.vllm_config):
                return
            del self._capture_descs[CUDAGraphMode.PIECEWISE]
            # A step with a prompt has fewer requests than tokens. One token alone is always decoded.
            whole = {
                one: replace(one, cg_mode=CUDAGraphMode.FULL, num_reqs=min(one.num_tokens - 1, self.max_num_reqs))
                for one in pieces
                if one.num_tokens > 1
            }
            full = [*self._capture_descs.get(CUDAGraphMode.FULL, []), *whole.values()]
            self._capture_descs[CUDAGraphMode.FULL] = sorted(full, key=lambda one: -one.num_tokens)
            for tokens, found in self._candidates.items():
                kept = (whole.get(one, one) for one in found)
                self._candidates[tokens] = [one for one in kept if one.cg_mode != CUDAGraphMode.PIECEWISE]

        def capture(self, *arguments: Any, **named: Any) -> Any:
            """All graphs, with attention planned as it will be at their replays."""
            from vllm.config import CUDAGraphMode

            if CUDAGraphMode.PIECEWISE not in self._capture_descs:
                longest = self.vllm_config.scheduler_config.max_num_batched_tokens
                given = inspect.signature(super().capture).bind(*arguments, **named).arguments
                for group in chain(*given["attn_groups"]):
                    builder = group.get_metadata_builder(0)
                    builder.build = _planned(builder, builder.build, longest)
            return super().capture(*arguments, **named)

    return WholeGraphs


def _attends_by_flash_3(config: Any) -> bool:
    """Whether all of the model's attention layers do, in a way that does not change the number of splits itself."""
    from vllm import envs
    from vllm.model_executor.layers.attention import Attention

    layers = [x for x in config.compilation_config.static_forward_context.values() if isinstance(x, Attention)]
    versions = {getattr(layer.impl, "vllm_flash_attn_version", None) for layer in layers}
    return versions == {3} and not envs.VLLM_BATCH_INVARIANT


def _planned(builder: Any, build: Callable[..., Any], longest: int) -> Callable[..., Any]:
    """`build` of vLLM's metadata, for which only the padded number of requests and whether any decodes alone count."""
    at_most = builder.max_num_splits
    processors = torch.cuda.get_device_properties(builder.device).multi_processor_count

    def planned(common_prefix_len: int, common_attn_metadata: Any, **named: Any) -> Any:
        blocks = common_attn_metadata.num_reqs * builder.num_heads_kv
        prompts = common_attn_metadata.max_query_len > 1
        builder.max_num_splits = 1 if prompts or blocks >= FILLED * processors else at_most
        if prompts:
            common_attn_metadata = replace(common_attn_metadata, max_query_len=longest)
        return build(common_prefix_len, common_attn_metadata, **named)

    return planned
