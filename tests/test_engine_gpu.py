"""The embedded engine on a GPU, where one ragged flash call attends for prompts and decoding rows together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_engine_embedded import END, VOCABULARY, engine_for, run, tiny_model

from ilr_fast.engines import cache
from ilr_fast.types import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_mixed_load_is_that_of_a_call_for_each_piece(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared and continued prefixes, prompts of several steps, more requests than slots; greedy, bfloat16.

    Each request's log-probs are compared up to where the two ways first sample another token.
    """
    g = np.random.default_rng(7)
    model = tiny_model(name).to("cuda", torch.bfloat16)
    stem = g.integers(2, VOCABULARY, 20).tolist()
    prompts = [stem[: g.integers(21)] + g.integers(2, VOCABULARY, g.integers(1, 40)).tolist() for _ in range(40)]
    samplings = [Sampling(12, temperature=0)] * len(prompts)
    calls = []
    torch_kernel = cache.torch_kernel
    monkeypatch.setattr(cache, "torch_kernel", lambda: calls.append(1) or torch_kernel())
    ragged = run(engine_for(model, slots=12, token_budget=50, stop_tokens=[END]), prompts, samplings)
    assert calls, "the ragged kernel ran"
    monkeypatch.setattr(cache, "kernel_fits", lambda *_: False)
    pieces = run(engine_for(model, slots=12, token_budget=50, stop_tokens=[END]), prompts, samplings)
    compared = 0
    for one, other in zip(ragged, pieces, strict=True):
        assert one.error is None
        same = next((n for n, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b), None)
        assert one.logps[:same] == pytest.approx(other.logps[:same], abs=0.1)
        compared += len(one.logps[:same])
    assert compared > 150
