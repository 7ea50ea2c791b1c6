"""How blocks of a prefix are named in vLLM's cache: a digest over the tokens' bytes instead of over pickled tuples.

A prompt of some hundred tokens has some thirty blocks, each named by what came before it and its own tokens; vLLM takes
ten times as long for them. The names live in one process and mean nothing outside it.

    with quick_hashes():
        client = InprocClient(…)
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

DIGEST = 16  # bytes: among a thousand billion blocks two have one name with a probability of 1e-15


@contextlib.contextmanager
def quick_hashes() -> Iterator[None]:
    """While a core starts: it names its requests' blocks as here."""
    from vllm.v1.engine import core

    theirs = core.get_request_block_hasher
    core.get_request_block_hasher = lambda size, function: block_hasher(size, theirs(size, function))
    try:
        yield
    finally:
        core.get_request_block_hasher = theirs


def block_hasher(size: int, other: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    """The names of the full blocks of `size` tokens that a request has none of yet; `other`: where not all is text."""

    def named(request: Any) -> list[Any]:
        names = request.block_hashes
        start = len(names) * size
        blocks = (request.num_tokens - start) // size
        if blocks <= 0:
            return []
        if request.mm_features or request.prompt_embeds is not None:
            return other(request)
        data = array("i", request.all_token_ids[start : start + blocks * size]).tobytes()
        width = len(data) // blocks
        before = names[-1] if names else _root(request)
        found = []
        for at in range(0, len(data), width):
            before = blake2b(before + data[at : at + width], digest_size=DIGEST).digest()
            found.append(before)
        return found

    return named


def _root(request: Any) -> bytes:
    """What stands before the first block: equal tokens under another adapter are other keys and values."""
    adapter = request.lora_request.lora_name if request.lora_request else None
    return repr((adapter, request.cache_salt)).encode()
