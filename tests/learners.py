"""Tiny agents and rollouts for the tests of training: random models of two families, saved as ordinary folders."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from ilr_fast.agent import Agent
from ilr_fast.config import AgentConfig, Config, LossConfig, OptimizerConfig, RolloutConfig
from ilr_fast.types import TrainingSequence, TrainingTurn

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
)  # fmt: skip
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, pad_token_id=0),
    "llama_tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES, sliding_window=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, final_logit_softcapping=3.0),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
}


def save_model(folder: Path, family: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for parameter in model.parameters():  # larger than the usual initialization, so that distributions are not flat
        torch.nn.init.normal_(parameter, std=0.15)
    path = folder / family
    model.save_pretrained(path)
    words().save_pretrained(path)
    return path


def words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the 97 words w0 … w96."""
    known = {f"w{n}": n for n in range(97)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w96", unk_token="w0")


def make_agent(
    model: Path,
    loss: LossConfig | None = None,
    rollout: RolloutConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    **keys,
) -> Agent:
    """An agent in float32 whose AdamW moves far enough to be seen."""
    optimizer = optimizer or OptimizerConfig(lr=1e-3, eps=1e-4, clip_norm=0.5)
    agent = AgentConfig(model=str(model), optimizer=optimizer, **{"device": "cpu", "dtype": "float32", **keys})
    run = Config(agents={"ada": agent}, loss=loss or LossConfig(), rollout=rollout or RolloutConfig(), steps=10)
    return Agent("ada", agent, run)


def rollout(seed: int = 0, questions: int = 3, dead: bool = True) -> list[TrainingSequence]:
    """Ragged groups of two-turn conversations over 97 words; with `dead`, some turns have advantage 0."""
    draw = random.Random(seed)
    words = lambda n: [draw.randrange(1, 97) for _ in range(n)]  # noqa: E731
    shots = words(5)
    sequences = []
    for question in range(questions):
        prompt = shots + words(3 + question)
        for sample in range(2 + question):
            first, between, second = words(1 + draw.randrange(4)), words(2), words(2 + draw.randrange(3))
            tokens = prompt + first + between + second
            edges = [(len(prompt), len(prompt) + len(first)), (len(tokens) - len(second), len(tokens))]
            advantages = [0.0 if dead and draw.random() < 0.4 else draw.gauss(0, 1) for _ in edges]
            turns = tuple(
                TrainingTurn(a, b, x, tuple(draw.gauss(-4, 0.5) for _ in range(a, b)))
                for (a, b), x in zip(edges, advantages, strict=True)
            )
            sequences.append(TrainingSequence(f"q{question}", sample, tuple(tokens), turns))
    return sequences


def weights(agent: Agent) -> torch.Tensor:
    """All weights in one vector, a copy."""
    return torch.cat([p.detach().flatten().float() for p in agent.model.parameters()])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance of two vectors."""
    return float((one - other).norm() / other.norm())
