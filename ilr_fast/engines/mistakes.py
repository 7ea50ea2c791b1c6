"""What is wrong with a request, in words, before an engine computes anything for it.

    mistake_of(tokens, sampling, vocabulary=49152, max_context=8192)      # None where all is well
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ilr_fast.types import Sampling


def mistake_of(tokens: Sequence[int], sampling: Sampling, *, vocabulary: int, max_context: int) -> str | None:
    """The first thing about a request that no engine can serve, or None."""
    if not len(tokens):
        return "the prompt is empty"
    if len(tokens) >= max_context:
        return f"the prompt has {len(tokens)} tokens, the context {max_context}: no room for an answer"
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        return f"the prompt holds a token outside the vocabulary of {vocabulary}"
    if sampling.max_tokens < 1 or sampling.temperature < 0 or not math.isfinite(sampling.temperature):
        return "max_tokens must be at least 1 and the temperature finite and not negative"
    if not 0 < sampling.top_p <= 1 or sampling.top_k < 0 or not all(sampling.stop):
        return "top_p must be in (0, 1], top_k not negative, and no stop string empty"
    return None


def failure_of(error: Exception) -> str:
    """What a request is told whose step failed."""
    if type(error).__name__ == "OutOfMemoryError":
        what = str(error).partition("\n")[0]
        return f"out of memory while generating: lower engine.slots or engine.max_context; ilr-fast plan helps ({what})"
    return f"{type(error).__name__}: {error}"
