"""A small model's rollout, which the host bounds: 1,024 requests of 256 tokens at once, beside plain `LLM.generate`.

    ilr-fast bench rollout_small      # one NVIDIA GPU with vLLM; half a minute and ten seconds a round

Random weights of SmolLM2-135M's shape, prompts of 64 tokens, 1,024 slots; both give log-probs.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ilr_benchmarks.common import row
from ilr_benchmarks.rollout_engine import error_of, options, ratio, speed, started, timed

from ilr_fast.errors import UserError
from ilr_fast.types import Sampling

PROMPT, TOKENS = 64, 256


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows; a row with a status alone where vLLM is missing."""
    requests, tokens = (8, 12) if quick else (1024, TOKENS)
    shape = f"{'small' if quick else 'SmolLM2-135M'}, {requests} requests of {tokens} tokens"
    settings = options(requests, quick, cache_gib=0.1 if quick else 9.0)
    try:
        engine, model = started({}, "smollm2", settings, quick, device)
    except UserError as error:
        yield row("by the engine", shape, [], status=str(error).splitlines()[0])
        return
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (requests, PROMPT)).tolist()

    async def all_at_once(limit: int) -> None:
        samplings = [Sampling(limit, seed=n) for n in range(requests)]
        found = await asyncio.gather(*map(engine.generate, prompts, samplings))
        assert all(len(one.tokens) == limit for one in found)

    asyncio.run(all_at_once(8))
    ours = [timed(lambda: asyncio.run(all_at_once(tokens)), engine) for _ in range(rounds)]
    yield row("by the engine", shape, ours, error=error_of(engine, model), **speed(ours, requests * tokens))
    if only_ours:
        return
    plain = _plain(model, settings, prompts, tokens, min(rounds, 2), device)
    yield row("plain LLM.generate, same settings", shape, plain, **speed(plain, requests * tokens))
    yield from ratio("beside plain LLM.generate", shape, plain, ours, 0.95)


def _plain(model: Any, settings: Any, prompts: list[list[int]], tokens: int, rounds: int, device: str) -> list[float]:
    from vllm import SamplingParams

    from ilr_fast.engines.vllm_core import plain_llm

    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]

    def generate(limit: int) -> None:
        parameters = SamplingParams(max_tokens=limit, ignore_eos=True, logprobs=0, detokenize=False)
        llm.generate(inputs, parameters, use_tqdm=False)

    with tempfile.TemporaryDirectory() as folder:
        llm = plain_llm(model, settings, folder, torch.device(device))
        generate(8)
        found = []
        for _ in range(rounds):
            llm.reset_prefix_cache()
            found.append(timed(lambda: generate(tokens)))
    return found
