"""Packed, fused training in bfloat16 on a GPU against unpacked transformers in float32, gradient by gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gradient_cases import agent_of, distance, errors, gradients, rollout, small
from vllm_models import FAMILIES

from ilr_fast import flash_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def check(found: dict[str, tuple[float, float]]) -> None:
    """No further from float32 than plain bfloat16 is: by 5% on average over the parameters, each by a half, since both
    errors are noise (an H200, three families, six seeds: means 0.78 to 0.92, one ratio of 576 above 1.2, 1.34; the
    long sequences of Qwen 2: mean 1.007)."""
    wrong = {n: (ours, plain) for n, (ours, plain) in found.items() if not ours < 1.5 * plain + 2e-3}
    assert not wrong, wrong
    assert sum(ours / plain for ours, plain in found.values()) <= 1.05 * len(found)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the flash kernel ran."""
    calls: list[int] = []
    real = flash_attention.TorchFlash.forward
    monkeypatch.setattr(flash_attention.TorchFlash, "forward", lambda *a: (calls.append(1), real(*a))[1])
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    check(errors(small(family), rollout(), "cuda"))
    assert bool(calls) == (family != "gemma2")  # soft-capped scores take masks


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "mistral"])
def test_long_sequences_and_windows(family: str) -> None:
    window = {"sliding_window": 300} if family != "qwen2" else {}
    check(errors(small(family, **window), rollout(prompt=1100, longest=3000, questions=1), "cuda"))


def test_micro_batches_add_up() -> None:
    model, sequences = small("qwen2"), rollout()
    whole = gradients(agent_of(model, "cuda", micro_batch_tokens=8192), sequences)
    parts = gradients(agent_of(model, "cuda", micro_batch_tokens=250), sequences)
    assert max(distance(parts[n], whole[n]) for n in whole) < 0.03
    check(errors(model, sequences, "cuda", micro_batch_tokens=250))


@pytest.mark.parametrize("budget", [8192, 250])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3", "mistral"])
def test_replayed_layers(family: str, budget: int) -> None:
    twice = lambda agent: [gradients(agent, rollout()) for _ in range(2)]  # noqa: E731
    check(errors(small(family), rollout(), "cuda", twice, micro_batch_tokens=budget, graph_tokens=4096))


@pytest.mark.parametrize("again", ["mlp", True])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_what_is_computed_again(family: str, again: str | bool) -> None:
    check(errors(small(family), rollout(), "cuda", gradient_checkpointing=again))


def test_prefixes_shared_or_not() -> None:
    def alone(agent):
        agent.rules = dataclasses.replace(agent.rules, share_prefixes=False)

    check(errors(small("qwen3"), rollout(), "cuda", prepare=alone))


def test_dropping_what_has_no_gradient_changes_nothing() -> None:
    model, sequences = small("llama"), rollout()
    dead = [dataclasses.replace(t, advantage=0.0) for t in sequences[0].turns]
    sequences[0] = dataclasses.replace(sequences[0], turns=tuple(dead))
    keeping, dropping = agent_of(model, "cuda"), agent_of(model, "cuda")
    keeping.rules = dataclasses.replace(keeping.rules, keep_dead=True)
    many, few = gradients(keeping, sequences), gradients(dropping, sequences)
    assert max(distance(few[n], many[n]) for n in many) < 0.02


@pytest.mark.parametrize("importance", ["none", "sequence"])
def test_deterministic_runs_agree_bit_for_bit(importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch told to refuse what is not deterministic, as `deterministic: true` does."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model, sequences, found = small("qwen2"), rollout(prompt=400, longest=900), []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            agent = agent_of(model, "cuda", micro_batch_tokens=1500)
            agent.policy_loss = dataclasses.replace(agent.policy_loss, importance=importance)
            agent.update(sequences, 1)
            found.append(torch.cat([p.detach().flatten() for p in agent.model.parameters()]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*found)
