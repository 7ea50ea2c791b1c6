"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made; `seconds` are those of steps, others' work beside them included."""

    requests: int = 0
    failed: int = 0
    steps: int = 0
    tokens_generated: int = 0
    tokens_prompt: int = 0
    tokens_reused: int = 0  # of the prompts' tokens, those that were not computed again
    seconds: float = 0.0
