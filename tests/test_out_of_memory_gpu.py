"""A GPU whose memory really runs out in an update: the step is taken again with less, and comes to the same weights."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gradient_cases import agent_of, distance, gradients, rollout, small

from ilr_fast.types import StepResult

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

TOKENS = 16384
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 16}


@contextmanager
def at_most(size: float) -> Iterator[None]:
    """PyTorch gets no more than so many bytes of the card in all."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def updated(model: Any, tokens: int) -> tuple[torch.Tensor, StepResult, int]:
    """Weights after one step with micro-batches of so many tokens, its result, and the most memory that it took."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    agent = agent_of(model, "cuda", micro_batch_tokens=tokens)
    result = agent.update(rollout(prompt=300, longest=1600, questions=5, samples=6), 1)
    weights = torch.cat([p.detach().flatten().cpu() for p in agent.model.parameters()])
    return weights, result, torch.cuda.max_memory_allocated()


def test_the_step_is_taken_again_on_a_card_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = small("qwen2", **SIZES)
    torch.use_deterministic_algorithms(True)
    try:
        whole, untold, most = updated(model, TOKENS)
        halved, _, less = updated(model, TOKENS // 2)
        assert less < 0.85 * most and untold.note is None
        with at_most((less + most) / 2):
            again, result, _ = updated(model, TOKENS)
    finally:
        torch.use_deterministic_algorithms(False)
    assert result.note is not None and f"micro_batch_tokens is {TOKENS // 2}" in result.note
    assert torch.equal(again, halved)
    assert distance(again, whole) < 1e-2


def test_its_gradient_is_that_of_a_card_with_room() -> None:
    model, sequences = small("qwen2", **SIZES), rollout(prompt=300, longest=1600, questions=5, samples=6)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    roomy = gradients(agent_of(model, "cuda", micro_batch_tokens=TOKENS), sequences)
    most = torch.cuda.max_memory_allocated()
    gc.collect()
    held = torch.cuda.memory_allocated()
    agent = agent_of(model, "cuda", micro_batch_tokens=TOKENS)
    with at_most(held + 0.75 * (most - held)):
        full = gradients(agent, sequences)
    assert agent.guard.tokens < TOKENS
    assert max(distance(full[n], roomy[n]) for n in roomy) < 0.03
