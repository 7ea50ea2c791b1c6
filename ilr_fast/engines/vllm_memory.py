"""vLLM's memory in regions: while its core opens, what it takes for weights, and for keys and values.

    regions = open_regions(device, "agents.ada")
    with filling(regions):
        …                                                   # the core opens
    regions["kv_cache"].only(tensors_of(runner.kv_caches))  # the rest of what it takes then stays
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ilr_fast.engines.regions import Region
from ilr_fast.errors import UserError


def open_regions(device: torch.device, where: str) -> dict[str, Region]:
    """A region for each of vLLM's names of its pools; UserError where its build has no such allocator."""
    from vllm.device_allocator.cumem import cumem_available

    if not cumem_available:
        raise UserError("this build of vLLM can't give memory back", f"{where}.engine", "set `engine.sleep: never`")
    return {kind: Region(device) for kind in ("weights", "kv_cache")}


@contextlib.contextmanager
def filling(regions: Mapping[str, Region]) -> Iterator[None]:
    """What vLLM allocates for weights and for keys and values lies in the regions, if there are any.

    Models of one process would share the tables of equal rotary embeddings, which would go with the engine that made
    them: the core that opens here gets tables of its own.
    """
    if not regions:
        yield
        return
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT as shared
    from vllm.v1.worker.gpu_worker import Worker

    def pool(worker: Any, tag: str) -> contextlib.AbstractContextManager[None]:
        return regions[tag].filling() if tag in regions else contextlib.nullcontext()

    own, tables = Worker._maybe_get_memory_pool_context, dict(shared)
    Worker._maybe_get_memory_pool_context = pool
    shared.clear()
    try:
        yield
    finally:
        Worker._maybe_get_memory_pool_context = own
        shared.clear()
        shared.update(tables)


def tensors_of(caches: Any) -> Iterator[torch.Tensor]:
    """The tensors of what may be lists of lists of them."""
    if isinstance(caches, torch.Tensor):
        yield caches
    elif isinstance(caches, (list, tuple)):
        for cache in caches:
            yield from tensors_of(cache)
