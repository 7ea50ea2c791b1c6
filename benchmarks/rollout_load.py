"""The work of the rollout benchmark: models with random weights, prompts, forced lengths, and who runs them how.

load = Load.drawn(vocabulary=151936, dialogues=1024, in_flight=512, most=512)
asyncio.run(talk(engine, load))          # each turn as soon as the one before it is there
asyncio.run(in_stages(engine, load))     # a batch for each stage, with a barrier after it
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ilr_fast.types import Sampling

TURNS, PROMPT, BETWEEN, MEAN, SIGMA = 3, 200, 60, 200, 0.6
QWEN = dict(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
LLAMA = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
SMALL = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip


class NoText:
    """A tokenizer for generations that nobody reads."""

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Load:
    """Dialogues of `TURNS` turns: `prompts` [dialogues][turns][PROMPT] and the forced `lengths` [dialogues, turns]."""

    prompts: list[list[list[int]]]
    lengths: np.ndarray
    in_flight: int

    @classmethod
    def drawn(cls, vocabulary: int, dialogues: int, in_flight: int, most: int) -> Load:
        """Log-normal lengths of mean 200, at most `most`, from a fixed seed."""
        g = np.random.default_rng(0)
        drawn = g.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, (dialogues, TURNS))
        prompts = g.integers(0, vocabulary, (dialogues, TURNS, PROMPT)).tolist()
        return cls(prompts, np.clip(drawn, 1, most).astype(int), in_flight)

    @property
    def generated(self) -> int:
        """Tokens that are sampled in all."""
        return int(self.lengths.sum())

    def cut(self, dialogues: int, most: int | None = None) -> Load:
        """The first so many dialogues, with turns of at most `most` tokens."""
        lengths = self.lengths[:dialogues]
        return Load(self.prompts[:dialogues], lengths if most is None else np.minimum(lengths, most), self.in_flight)


def random_model(family: str, device: str, quick: bool) -> Any:
    """`qwen` (Qwen2 1.5B), `llama` (Llama 3.2 1B) or `smollm2` (135M): shapes, bfloat16 on a GPU; small where quick."""
    import transformers

    qwen, llama = transformers.Qwen2Config, transformers.LlamaConfig
    kind, sizes = {"qwen": (qwen, QWEN), "llama": (llama, LLAMA), "smollm2": (llama, SMOLLM2)}[family]
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        config = kind(**(SMALL if quick else sizes))
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


async def talk(engine: Any, load: Load) -> None:
    """All dialogues, at most `in_flight` at a time, each turn as soon as the one before it is there."""
    gate = asyncio.Semaphore(load.in_flight)

    async def one(number: int) -> None:
        async with gate:
            tokens = list(load.prompts[number][0])
            for turn in range(TURNS):
                tokens = await _turn(engine, load, number, turn, tokens)

    await asyncio.gather(*(one(n) for n in range(len(load.prompts))))


async def in_stages(engine: Any, load: Load) -> None:
    """Batches of `in_flight` dialogues, stage by stage: the next stage begins when all turns of this one are there."""
    for start in range(0, len(load.prompts), load.in_flight):
        numbers = range(start, min(start + load.in_flight, len(load.prompts)))
        tokens = {n: list(load.prompts[n][0]) for n in numbers}
        for turn in range(TURNS):
            said = await asyncio.gather(*(_turn(engine, load, n, turn, tokens[n]) for n in numbers))
            tokens = dict(zip(numbers, said, strict=True))


async def _turn(engine: Any, load: Load, number: int, turn: int, tokens: list[int]) -> list[int]:
    """One turn of the forced length; the conversation after it, with what comes before the next turn."""
    result = await engine.generate(tokens, Sampling(int(load.lengths[number, turn]), seed=number * TURNS + turn))
    if len(result.tokens) != load.lengths[number, turn]:
        raise RuntimeError(f"a turn has {len(result.tokens)} tokens: {result.error}")
    return [*tokens, *result.tokens, *load.prompts[number][min(turn + 1, TURNS - 1)][:BETWEEN]]
