"""How much one step of an engine computes at once: the memory plan counts by the same numbers.

On a GPU a step costs the launches of its kernels, so that fewer and larger ones are faster, until its products fill the
card; on the CPU smaller ones stay in its caches.
"""

from __future__ import annotations

_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 25}  # rows × vocabulary in one buffer: 64 and 128 MiB in float32
_TOKENS = {"cpu": 1024, "cuda": 8192}
VLLM_TOKENS = 8192  # of one step of vLLM's on a GPU at most, as in its own `LLM`
GRAPH_TOKENS = 3072  # prompt tokens beside what decodes in the largest step of vLLM's that is a CUDA graph
GRAPH_REQUESTS = 1024  # that decode in the largest graph
# Tokens × parameters of a layer: below it a GPU has computed a layer before the host has launched the layer's kernels,
# whether once forward (0.5 ms, two operations) or there and back in training (2 ms, six operations; H100).
LAUNCHED = 7e10
SPARE_TOKENS = 128  # of keys and values beyond the context, for each of vLLM's requests
WIDEST = 1 << 25  # numbers of an MLP's inner activations, on a GPU: 64 MiB in bfloat16


def logit_rows(device: str, vocabulary: int) -> int:
    """Rows of logits that are held at once on a device of this type (`torch.device.type`)."""
    return max(1, _LOGITS[_kind(device)] // vocabulary)


def prompt_tokens(device: str, intermediate: int) -> int:
    """Prompt tokens of one step on a device of this type, for MLPs of so many inner features."""
    most = _TOKENS[_kind(device)]
    return most if device == "cpu" else min(most, max(1024, WIDEST // intermediate))


def vllm_tokens(slots: int, layer: float) -> int:
    """Most tokens of one step of vLLM's on a GPU, for so many requests at once and parameters of a layer.

    For a small model as many as its largest CUDA graph holds: the host would launch more for longer than they take.
    """
    graph = min(slots, GRAPH_REQUESTS) + GRAPH_TOKENS
    return max(slots, graph if VLLM_TOKENS * layer < LAUNCHED else VLLM_TOKENS)


def longest_request(wanted: int | None, positions: int | None) -> int:
    """Tokens of a request at most: what is asked for, else the model's own limit, 4,096 where it names none."""
    return wanted or positions or 4096


def _kind(device: str) -> str:
    """Any accelerator (`mps`, `xpu`) is taken for a GPU."""
    return "cpu" if device == "cpu" else "cuda"
