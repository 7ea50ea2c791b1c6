"""Names of blocks in vLLM's prefix cache: equal where everything up to a block's end is, and only there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

SIZE = 4


def request_of(tokens: list[int], **more: Any) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    from ilr_fast.engines.vllm_hashes import block_hasher

    hasher = block_hasher(SIZE, lambda request: ["vLLM's"])
    return Request("7", tokens, SamplingParams(max_tokens=9), None, block_hasher=hasher, arrival_time=0.0, **more)


def test_full_blocks_are_named_by_all_before_their_end() -> None:
    names = request_of(list(range(11))).block_hashes
    assert len(names) == 2 and len(set(names)) == 2
    assert request_of([*range(7), 99, *range(4)]).block_hashes[0] == names[0]
    assert request_of([*range(7), 99, *range(4)]).block_hashes[1] != names[1]
    assert request_of([9, *range(1, 11)]).block_hashes[1] != names[1], "a block's name holds what came before it"
    assert request_of([4, 5, 6, 7]).block_hashes != names[1:]
    assert request_of([1, 2, 3]).block_hashes == []


def test_names_that_come_one_by_one_are_the_same() -> None:
    tokens = [150_000 + n for n in range(14)]
    request = request_of(tokens[:3])
    for token in tokens[3:9]:
        request.append_output_token_ids(token)
    request.append_output_token_ids(tokens[9:])
    assert request.block_hashes == request_of(tokens).block_hashes and len(request.block_hashes) == 3


def test_another_adapter_or_salt_has_other_names() -> None:
    from vllm.lora.request import LoRARequest

    kinds: list[dict[str, Any]] = [{}, dict(cache_salt="a"), dict(cache_salt="b")]
    kinds += [dict(lora_request=LoRARequest(name, 1, "/nowhere")) for name in ("a", "b")]
    assert len({request_of([1, 2, 3, 4], **more).block_hashes[0] for more in kinds}) == len(kinds)


def test_what_is_not_text_is_named_by_vllm() -> None:
    from ilr_fast.engines.vllm_hashes import block_hasher

    image: Any = SimpleNamespace(
        block_hashes=[], num_tokens=SIZE, all_token_ids=[1] * SIZE, mm_features=[0], prompt_embeds=None
    )
    assert block_hasher(SIZE, lambda request: ["vLLM's"])(image) == ["vLLM's"]


def test_engines_are_opened_with_them() -> None:
    from vllm.v1.engine import core

    from ilr_fast.engines.vllm_hashes import quick_hashes

    theirs = core.get_request_block_hasher
    with quick_hashes():
        hasher = core.get_request_block_hasher(SIZE, lambda _: b"theirs")
    assert core.get_request_block_hasher is theirs
    named = request_of([1] * 8)
    names, named.block_hashes = named.block_hashes, []
    assert hasher(named) == names
