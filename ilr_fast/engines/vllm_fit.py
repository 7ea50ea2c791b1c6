"""Whether a request fits: the model's positions, and the memory of keys and values."""

from __future__ import annotations

from typing import Any

import torch

from ilr_fast.engines.device_memory import available_host_memory
from ilr_fast.engines.step_size import SPARE_TOKENS, longest_request
from ilr_fast.errors import UserError

CACHE_SHARE = 0.25  # of the memory that is free, where `cache_gib` is null
GIB = 2**30


def context_of(model: Any, wanted: int | None, where: str) -> int:
    """Tokens of a request at most: `wanted`, or else the model's own limit; UserError where it has fewer positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = longest_request(wanted, limit)
    check_positions(context, limit, where)
    return context


def check_positions(context: int, limit: int | None, where: str) -> None:
    """UserError for a context of more tokens than the model has positions; None: unknown."""
    if limit is not None and context > limit:
        raise UserError(
            f"a context of {context} tokens, where the model has {limit} positions",
            f"{where}.engine.max_context",
            f"use at most {limit}, or null",
        )


def cache_bytes(
    model: Any, dtype: torch.dtype, wanted_gib: float | None, slots: int, context: int, device: torch.device, where: str
) -> int:
    """Bytes for keys and values in `dtype`; UserError where they don't hold one request, or are more than is free."""
    token = bytes_per_token(model, dtype)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_host_memory()
    if wanted_gib is not None:
        cache = int(wanted_gib * GIB)
    else:
        cache = min(slots * (context + SPARE_TOKENS) * token, int(CACHE_SHARE * free))
    check_one_request(cache, context, token, where)
    if cache > free:
        raise UserError(
            f"{_gib(cache)} of keys and values, and {_gib(free)} free",
            f"{where}.engine.cache_gib",
            "lower it, or free memory",
        )
    return cache


def check_one_request(cache: int, context: int, token: int, where: str) -> None:
    """UserError where `cache` bytes do not hold one request of `context` tokens, of `token` bytes each."""
    if cache < context * token:
        raise UserError(
            f"one request of {context} tokens takes {_gib(context * token)} of keys and values; "
            f"there are {_gib(cache)} for them",
            f"{where}.engine.cache_gib",
            "raise it (null: a quarter of the free memory), or lower engine.max_context",
        )


def bytes_per_token(model: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers, in `dtype`."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * dtype.itemsize


def _gib(size: float) -> str:
    return f"{size / GIB:,.3g} GiB" if size < 1000 * GIB else f"{size / GIB:,.0f} GiB"
