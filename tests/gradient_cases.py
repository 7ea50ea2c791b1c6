"""Gradients of a GRPO step three ways: the agent's, and transformers' on unpacked sequences in any precision.

errors(small("qwen3"), sequences, device)      # {parameter: (ours, plain bfloat16)} against float32
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm_models import small_model

from ilr_fast.agent import Agent
from ilr_fast.config import AgentConfig, Config, OptimizerConfig
from ilr_fast.loading import for_training
from ilr_fast.optimizer import Outcome
from ilr_fast.types import TrainingSequence, TrainingTurn

VOCABULARY = 512
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64, max_position_embeddings=8192,
)  # fmt: skip


def small(family: str, **changes: Any) -> Any:
    """A model of the family with heads that a flash kernel takes; its weights are bfloat16 numbers, in float32."""
    model = small_model(family, tied=True, **{**SIZES, **changes})
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.08)
        if name.endswith("norm.weight") and "gemma" not in family:
            parameter.data += 1
        parameter.data = parameter.data.bfloat16().float()
    return model


def rollout(prompt: int = 70, longest: int = 120, questions: int = 3, samples: int = 4, seed: int = 0) -> list:
    """Groups that share a prompt, of which some tokens are common to all; two turns each; some answers start alike."""
    g = np.random.default_rng(seed)
    words = lambda n: g.integers(2, VOCABULARY, n).tolist()  # noqa: E731
    system, found = words(prompt // 3), []
    for question in range(questions):
        asked, start = system + words(prompt - len(system)), words(5)
        for sample in range(samples):
            first = start * (sample % 2) + words(int(g.integers(1, longest // 2)))
            between, second = words(4), words(int(g.integers(1, longest // 2)))
            edges = [(len(asked), len(asked) + len(first))]
            edges.append((edges[0][1] + len(between), edges[0][1] + len(between) + len(second)))
            turns = tuple(TrainingTurn(a, b, float(g.normal()), (-6.0,) * (b - a)) for a, b in edges)
            found.append(TrainingSequence(f"q{question}", sample, tuple(asked + first + between + second), turns))
    return found


def agent_of(model: Any, device: str, **keys: Any) -> Agent:
    """An agent that trains a copy of the model in bfloat16 on a GPU, in float32 elsewhere."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    optimizer = OptimizerConfig(lr=1e-3, rounding="stochastic", clip_norm=None)
    config = AgentConfig(**{"model": "random", "device": device, "optimizer": optimizer, **keys})
    ready = for_training(copy.deepcopy(model).to(device, dtype), config, "agents.ada", 0)
    return Agent("ada", config, Config(agents={"ada": config}, steps=10), tokenizer=object(), model=ready)


def gradients(agent: Agent, sequences: list[TrainingSequence]) -> dict[str, Tensor]:
    """What one update gives to the optimizer, in float32."""
    optimizer, found = agent.optimizer, {}
    assert optimizer is not None

    def step(step: int, *, loss_scale: float = 1.0, sinks: Any = None) -> Outcome:
        for name, parameter in agent.model.named_parameters():
            gradient = (sinks or {}).get(parameter, parameter.grad)
            if gradient is not None:
                found[name] = gradient.detach().float().clone()
        return Outcome(0.0, 0.0, False)

    real, optimizer.step = optimizer.step, step  # type: ignore[method-assign]
    try:
        agent.update(sequences, 1)
    finally:
        optimizer.step = real  # type: ignore[method-assign]
    return found


def plain_gradients(
    model: Any, sequences: list[TrainingSequence], device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same by transformers alone, one sequence after the other; the loss is the mean of the turns' means."""
    model = copy.deepcopy(model).to(device, dtype).requires_grad_().eval()
    turns = sum(len(s.turns) for s in sequences)
    for sequence in sequences:
        ids = torch.tensor([sequence.tokens], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].to(torch.promote_types(dtype, torch.float32))
        logp = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        terms = [-t.advantage * logp[t.start - 1 : t.end - 1].mean() for t in sequence.turns]
        (torch.stack(terms).sum() / turns).backward()
    return {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


def errors(
    model: Any,
    sequences: list[TrainingSequence],
    device: str,
    prepare: Callable[[Agent], Any] | None = None,
    **keys: Any,
) -> dict[str, tuple[float, float]]:
    """Relative errors of each parameter's gradient against float32: the agent's, and plain bfloat16's."""
    agent = agent_of(model, device, **keys)
    if prepare:
        prepare(agent)
    ours = gradients(agent, sequences)
    truth = plain_gradients(model, sequences, device, torch.float32)
    coarse = plain_gradients(model, sequences, device, torch.bfloat16)
    assert ours.keys() == truth.keys()
    return {n: (distance(ours[n], truth[n]), distance(coarse[n], truth[n])) for n in truth}


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative; a NaN, which no maximum of several would show, is a failure here."""
    error = float((found.double() - truth.double()).norm() / truth.double().norm())
    assert error == error, "not a number"
    return error
