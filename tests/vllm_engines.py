"""Engines of vLLM for small models, on its CPU build.

engine = engine_for(small_model("llama"), weights="copy")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_engine_embedded import END, log_probs, prompts_of, run, tiny_tokenizer

from ilr_fast.types import Generation, Sampling


def engine_for(model: Any, **options: Any) -> Any:
    from ilr_fast.engines.vllm import VllmEngine
    from ilr_fast.engines.vllm_core import CoreOptions

    own = {k: options.pop(k) for k in ("weights", "stop_tokens", "seeded", "where") if k in options}
    core = CoreOptions(**{"slots": 8, "cache_gib": 0.05, **options})
    return VllmEngine(model, tiny_tokenizer(), options=core, **{"stop_tokens": [END], **own})


def expected(model: Any, prompt: Sequence[int], result: Generation, temperature: float = 1.0) -> Any:
    """What a request's log-probs are by the trainer, within rounding in float32."""
    with torch.no_grad():
        return pytest.approx(log_probs(model, prompt, result.tokens, temperature), abs=1e-4)


def next_request_sees(engine: Any, model: Any, change: Callable[[], object]) -> None:
    """A change that flips the most likely token is what the next request samples from, whatever was cached before."""
    prompt, greedy = prompts_of([200])[0], Sampling(4, temperature=0)
    before = run(engine, [prompt], [greedy])[0]
    reused = engine.stats().tokens_reused
    assert run(engine, [prompt], [greedy])[0] == before and engine.stats().tokens_reused >= reused + 128
    with torch.no_grad():
        change()
    reused = engine.stats().tokens_reused
    engine.weights_changed()
    after = run(engine, [prompt], [greedy])[0]
    assert engine.stats().tokens_reused == reused, "keys and values of the old weights are gone"
    assert after.tokens[0] != before.tokens[0]
    assert after.logps == expected(model, prompt, after)
