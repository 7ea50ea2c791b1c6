"""Engines of vLLM for small models, on its CPU build.

engine = engine_for(small_model("llama"), weights="copy")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_engine_embedded import END, log_probs, tiny_tokenizer

from ilr_fast.types import Generation


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
