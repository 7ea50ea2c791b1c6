"""Spares vLLM what a rollout does not need: Python for every running request and step, and work of its start.

With hundreds of requests in a model of one or two billion parameters a decoding step takes the GPU less time than
vLLM's own Python takes the host, half of it to find out that a request needs no new block of the cache. So the
requests of such steps are told so at once. At a start vLLM collects garbage before each CUDA graph, through all objects
of the process, and compiles the kernels of ways to sample that are never asked for.

A step that takes in a prompt can't replay the graph of a decoding step. vLLM has graphs for it that stop at every
attention layer: from its compiler, or captured around attention without one (`VLLM_USE_BREAKABLE_CUDAGRAPH`).

    with quick_start():
        client = InprocClient(…)              # its compilation_config: graphs(slots)
    spare_slots(client.engine_core.scheduler)
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

DECODES = {"num_lookahead_tokens"}  # what vLLM's scheduler passes for a running request, and only then


def spare_slots(scheduler: Any) -> None:
    """A request that decodes one token inside a block that it has gets no slots allocated: it needs none.

    vLLM's own function is asked where a block begins or ends, one token later too (asynchronous scheduling hashes a
    block when its last token is known), and for everything else.
    """
    manager = scheduler.kv_cache_manager
    sizes = {one.block_size for one in manager.coordinator.single_type_managers}
    if len(sizes) != 1 or getattr(scheduler, "num_lookahead_tokens", 0) != 0:
        return
    size, allocate, nothing = sizes.pop(), manager.allocate_slots, manager.empty_kv_cache_blocks

    def allocate_slots(request: Any, num_new_tokens: int, **more: Any) -> Any:
        inside = num_new_tokens == 1 and 1 < request.num_computed_tokens % size < size - 1
        if inside and more.keys() == DECODES and request.num_computed_tokens > request.num_prompt_tokens:
            return nothing
        return allocate(request, num_new_tokens, **more)

    manager.allocate_slots = allocate_slots


def graphs(slots: int) -> dict[str, Any]:
    """vLLM's settings for a start without its compiler: whole graphs at few sizes where a step only decodes; in pieces,
    at some sizes more, where prompts come in beside."""
    decoding = [n for n in (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512) if n < slots]
    decoding.append(min(slots, 512))
    if not _graphs_stop_at_attention():
        return {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": decoding}
    beside = [decoding[-1] + prompts for prompts in (64, 128, 256, 512)]
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
        with _no_bars():
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
