"""How much one step of the embedded engine computes at once: the memory plan counts by the same numbers.

On a GPU a step costs the launches of its kernels, so that fewer and larger ones are faster, until its products fill the
card; on the CPU smaller ones stay in its caches.
"""

from __future__ import annotations

LOGITS = {"cpu": 1 << 24, "cuda": 1 << 25}  # rows × vocabulary in one buffer: 64 and 128 MiB in float32
TOKENS = {"cpu": 1024, "cuda": 8192}
WIDEST = 1 << 25  # numbers of an MLP's inner activations, on a GPU: 64 MiB in bfloat16


def prompt_tokens(device: str, intermediate: int) -> int:
    """Prompt tokens of one step, on `cpu` or `cuda`, for MLPs of so many inner features."""
    most = TOKENS[device]
    return most if device == "cpu" else min(most, max(1024, WIDEST // intermediate))
