"""Prefixes that slots share, where they fill the cache to its last token."""

import pytest
import torch

from ilr_fast.attention import AttentionSettings
from ilr_fast.engines.cache import GROW_TOKENS, CachePlan, SlotCache
from ilr_fast.engines.ragged import RaggedReads
from ilr_fast.engines.slots import Copy, Piece


@pytest.mark.parametrize("length", [GROW_TOKENS - 1, GROW_TOKENS, 2 * GROW_TOKENS])
def test_a_shared_prefix_of_any_length_is_copied(length):
    cache = SlotCache(max_slots=4)
    plan = CachePlan(cache, [Piece(0, 0, length)], [Copy(0, (1, 3), length)], torch.device("cpu"))
    query, key = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
    plan.attend(0, query, key, 2 * key, AttentionSettings(scale=0.3))
    keys, values = cache.layer(0, key)
    for slot in (0, 1, 3):
        assert torch.equal(keys[slot, :, :length], key[0]) and torch.equal(values[slot, :, :length], 2 * key[0])


def test_prefixes_copied_from_copies_are_those_of_one_after_the_other():
    copies = [Copy(0, (1, 3), 5), Copy(1, (2,), 7), Copy(3, (4,), 4), Copy(2, (5, 6), 6)]
    cache = torch.arange(7 * 2 * 8 * 3.0).view(7, 2, 8, 3)
    expected = cache.clone()
    for copy in copies:
        for target in copy.targets:
            expected[target, :, : copy.length] = expected[copy.source, :, : copy.length].clone()
    reads = RaggedReads([Piece(0, 0, 1)], copies, torch.device("cpu"))
    reads.copy_prefixes(cache)
    assert torch.equal(cache, expected)
