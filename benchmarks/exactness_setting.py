"""A model with random weights, its engine, its trainer, and requests: what `ilr-fast bench exactness` measures on.

setting = Setting(quick=False, device="cuda", exact=True)
engine, model = setting.open()
told, results = setting.measure(rounds=3)
"""

from __future__ import annotations

import asyncio
import gc
import time
from functools import cached_property
from typing import Any

import numpy as np
import torch
from ilr_benchmarks.common import row
from ilr_benchmarks.rollout_load import QWEN, NoText

from ilr_fast.types import Generation, Sampling, TrainingSequence, TrainingTurn

PROMPT, SAMPLED, REQUESTS = 128, 256, 128
NOISY = 64  # requests that the engine computes once more
QUICK = dict(
    vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
ROWS = 8192  # packed tokens of one forward pass
SCALE = 6.0  # of the last norm: log-probs of some nats


class Setting:
    """A model, its engine, and requests."""

    def __init__(self, quick: bool, device: str, exact: bool = False, config: Any = None):
        import transformers

        self.device, self.exact = device, exact
        self.agent_config: dict[str, Any] = {"fused_layers": "on" if exact else "off"}
        self.config = config or transformers.Qwen2Config(**(QUICK if quick else QWEN))
        self.requests = 12 if quick else REQUESTS
        self.sampled = 24 if quick else SAMPLED
        self.shape = f"{'small' if quick else 'Qwen2 1.5B'}, {self.requests} requests of {PROMPT} + {self.sampled}"
        draw = np.random.default_rng(0)
        self.prompts = draw.integers(0, self.config.vocab_size, (self.requests, PROMPT)).tolist()

    def open(self) -> tuple[Any, Any]:
        """The engine and the model that shares its weights."""
        import transformers

        from ilr_fast.attention import prepare
        from ilr_fast.engines import vllm_logps
        from ilr_fast.engines.vllm import VllmEngine
        from ilr_fast.engines.vllm_core import CoreOptions, check_version
        from ilr_fast.engines.vllm_process import prepare_process

        check_version("bench")
        prepare_process(exact=self.exact)
        vllm_logps.KEPT = NOISY
        torch.manual_seed(0)
        with torch.device(self.device):
            dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
            self.model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        with torch.no_grad():
            self.model.model.norm.weight.mul_(SCALE)
        prepare(self.model)
        options = CoreOptions(slots=self.requests, max_context=4096, exact=self.exact,
                              cache_gib=0.2 if self.requests < 64 else 4.0)  # fmt: skip
        self.engine = VllmEngine(self.model, NoText(), options=options, seeded=False, where="bench")
        return self.engine, self.model

    def measure(self, rounds: int) -> tuple[dict[str, Any], list[Generation]]:
        """Seconds of the rollout, tokens a second, differences to the trainer and the engine's own noise."""
        self.sample(tokens=8)
        seconds = []
        for _ in range(min(rounds, 3)):
            self.engine.weights_changed()
            results = self.sample()
            seconds.append(self.sample_seconds)
        told = self.differences(results) | {"engine_noise": self.engine.noise(), "seconds": seconds}
        told["tokens_per_second"] = self.requests * self.sampled / float(np.median(seconds))
        return told, results

    def sample(self, tokens: int | None = None) -> list[Generation]:
        async def all_of_them() -> list[Generation]:
            return list(await asyncio.gather(*(
                self.engine.generate(prompt, Sampling(tokens or self.sampled, seed=n))
                for n, prompt in enumerate(self.prompts)
            )))  # fmt: skip

        start = time.perf_counter()
        results = asyncio.run(all_of_them())
        self.sample_seconds = time.perf_counter() - start
        assert all(r.finish == "length" for r in results), [r.error for r in results if r.error][:1]
        return results

    def differences(self, results: list[Generation]) -> dict[str, Any]:
        """Mean and largest |trainer's − engine's log-prob|, of what enters the loss, by an update at rate 0."""
        agent = self.agent
        start = time.perf_counter()
        told = agent.update(self._sequences(results), 1)
        _synchronize()
        self.update_seconds = time.perf_counter() - start
        assert told.tokens_trained == len(results) * self.sampled and told.skipped is None, told
        said = np.concatenate([r.logps for r in results])
        keys = ("logp_diff_mean", "logp_diff_max", "grad_norm")
        return {key: told.metrics[key] for key in keys} | {"mean_logp": float(said.mean())}

    def changed(self, **config: Any) -> None:
        """Weights were written by hand, or the trainer's config changes: it is made anew."""
        self.agent_config |= config
        del self.agent

    @cached_property
    def agent(self) -> Any:
        from ilr_fast.agent import Agent
        from ilr_fast.config import AgentConfig, Config, OptimizerConfig

        self.model.requires_grad_(True)
        in_place: dict[str, Any] = {"rounding": "stochastic", "moments": "bfloat16"} if self.device == "cuda" else {}
        optimizer = OptimizerConfig(lr=0.0, **in_place)
        config = AgentConfig(model="random", optimizer=optimizer, micro_batch_tokens=ROWS, **self.agent_config)
        return Agent("bench", config, Config(), NoText(), self.model, self.engine.kernel)

    def updates(self, results: list[Generation], rounds: int) -> list[float]:
        """Seconds of an update: forward, backward, AdamW."""
        found = []
        for _ in range(min(rounds, 3)):
            self.differences(results)
            found.append(self.update_seconds)
        return found

    def memory(self) -> dict[str, Any]:
        """Whether an update had the room that it asked for: else its micro-batches or the allocator's pace suffer."""
        told: dict[str, Any] = {"micro_batch_tokens": self.agent.guard.tokens}
        if self.device == "cuda":
            told["allocator_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
            told["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return told

    def close(self) -> None:
        """Gives the memory up for the processes that follow; who holds the engine or the model lets go first."""
        self.engine.close()
        for name in ("agent", "engine", "model"):
            self.__dict__.pop(name, None)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def step(self, variant: str, rollouts: list[float], updates: list[float]) -> dict[str, Any]:
        """Rollout and update together, medians of each; seconds."""
        parts = [float(np.median(seconds)) for seconds in (rollouts, updates)]
        return row(variant, self.shape, [], step_seconds=sum(parts), rollout=parts[0], update=parts[1])

    def _sequences(self, results: list[Generation]) -> list[TrainingSequence]:
        """One group a request, with advantages of both signs."""
        found = []
        for n, (prompt, result) in enumerate(zip(self.prompts, results, strict=True)):
            tokens = (*prompt, *result.tokens)
            turn = TrainingTurn(len(prompt), len(tokens), 1.0 if n % 2 else -1.0, result.logps)
            found.append(TrainingSequence(str(n), 0, tokens, (turn,)))
        return found


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
