"""A quick start of vLLM: without its compiler, and without work that a rollout does not need.

At a start vLLM collects garbage before each CUDA graph, through all objects of the process, and compiles the kernels of
ways to sample that are never asked for.

A step that takes in a prompt can't replay the graph of a decoding step. vLLM has graphs for it that stop at every
attention layer: from its compiler, or captured around attention without one (`VLLM_USE_BREAKABLE_CUDAGRAPH`).

    with quick_start():
        client = InprocClient(…)              # its compilation_config: graphs(slots)
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from ilr_fast.engines.step_size import GRAPH_REQUESTS, GRAPH_TOKENS
from ilr_fast.engines.vllm_graphs import whole_graphs
from ilr_fast.engines.vllm_hashes import quick_hashes

PROMPTS = (64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, GRAPH_TOKENS)  # tokens beside those that decode


def graphs(slots: int) -> dict[str, Any]:
    """vLLM's settings for a start without its compiler: whole graphs at few sizes where a step only decodes; in pieces,
    at some sizes more, where prompts come in beside: without a graph the host is slower there than the GPU.
    """
    decoding = [n for n in (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, GRAPH_REQUESTS) if n < slots]
    decoding.append(min(slots, GRAPH_REQUESTS))
    if not _graphs_stop_at_attention():
        return {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": decoding}
    beside = [decoding[-1] + prompts for prompts in PROMPTS]
    return {"mode": 0, "cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [*decoding, *beside]}


def _graphs_stop_at_attention() -> bool:
    """Whether vLLM's attention was imported with the break in it; it wraps the function at import or never."""
    from vllm import envs
    from vllm.model_executor.layers.attention import attention

    outermost = attention.unified_attention_with_output.__code__.co_filename
    return bool(envs.VLLM_USE_BREAKABLE_CUDAGRAPH) and outermost.endswith("breakable_cudagraph.py")


@contextlib.contextmanager
def quick_start() -> Iterator[None]:
    """While a core starts: garbage is collected once, and only the kernels of plain sampling are compiled."""
    from vllm import SamplingParams

    gc.collect()
    gc.freeze()  # what is there stays; vLLM freezes everything anyway when it has started
    every_way = SamplingParams.__dict__.get("for_sampler_warmup")
    if every_way is not None:
        SamplingParams.for_sampler_warmup = staticmethod(lambda: SamplingParams(logprobs=0))
    try:
        with _no_bars(), whole_graphs(), quick_hashes():
            yield
    finally:
        if every_way is not None:
            SamplingParams.for_sampler_warmup = every_way


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """vLLM's progress bars of captured graphs would tear the display of the run."""
    from vllm.v1.worker.gpu import cudagraph_utils

    own = cudagraph_utils.tqdm
    cudagraph_utils.tqdm = lambda sizes, **_: sizes
    try:
        yield
    finally:
        cudagraph_utils.tqdm = own
