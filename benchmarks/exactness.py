"""How far the trainer's log-probs of sampled tokens are from the engine's, what each measure gains, and what it costs.

    ilr-fast bench exactness        # one NVIDIA GPU with vLLM; about three minutes

A model of Qwen2's 1.5B shape with random weights, its last norm scaled so that tokens have log-probs of some nats.
Requests of 128 tokens each sample 256 more. The trainer then updates on them (at rate 0), which gives the differences
of what enters the loss, and the engine computes some of them once more as prompts (its own noise). Measures of the
default mode:

    logits in bfloat16 (vLLM's own) · in float32 (what the engine does here) · and log-probs by `linear_logprob`
    the trainer's layers as transformers has them · with RoPE in float32, rounded once · fused (what training does)

A process of its own has vLLM in its batch-invariant mode, and the trainer's forward pass by its kernels (`exact:
true`): every difference must be 0, also after an update, and must not be 0 once one parameter has changed.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ilr_benchmarks.common import row
from ilr_benchmarks.rollout_load import QWEN, NoText

from ilr_fast.errors import UserError
from ilr_fast.types import Generation, Sampling, TrainingSequence, TrainingTurn

PROMPT, SAMPLED, REQUESTS = 128, 256, 256
QUICK = dict(
    vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
ROWS = 8192  # packed tokens of one forward pass
SCALE = 6.0  # of the last norm: log-probs of some nats


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> list[dict[str, Any]]:
    """Rows of the default mode, and from a process of its own of the exact one."""
    try:
        rows = default_mode(quick, device, rounds)
    except UserError as error:
        return [row("default", "", [], status=str(error).splitlines()[0])]
    if device == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "ilr_benchmarks.exactness", str(file), str(int(quick)), str(rounds)]
            subprocess.run(command, check=False)
            rows += json.loads(file.read_text()) if file.exists() else [row("exact", "", [], status="failed")]
    return rows


def default_mode(quick: bool, device: str, rounds: int) -> list[dict[str, Any]]:
    """The measures one by one, on the same engine."""
    from ilr_fast.engines import vllm_logps

    setting = Setting(quick, device)
    engine, model = setting.open()
    _plain_logits(engine)
    told, _ = setting.measure(rounds)
    rows = [row("logits in bfloat16", setting.shape, told.pop("seconds"), **told)]
    vllm_logps.float32_logits(engine._core.model)
    told, results = setting.measure(rounds)
    rows.append(row("logits in float32", setting.shape, told.pop("seconds"), **told))
    with _rope_in_float32():
        rows.append(row("  and the trainer's RoPE", setting.shape, [], **setting.differences(results)))
    if device == "cuda":
        setting.changed(fused_layers="on")
        rows.append(row("  and its layers fused", setting.shape, [], **setting.differences(results)))
    rows.append(row("an update", setting.shape, setting.updates(results, rounds)))
    if device == "cuda":
        setting.own_logps()
        told, _ = setting.measure(rounds)
        rows.append(row("  and log-probs by linear_logprob", setting.shape, told.pop("seconds"), **told))
    engine.close()
    return rows


def exact_mode(quick: bool, rounds: int) -> list[dict[str, Any]]:
    """The exact mode; `error` is the largest difference over all sampled tokens."""
    setting = Setting(quick, "cuda", exact=True)
    engine, model = setting.open()
    told, results = setting.measure(rounds)
    rows = [row("exact", setting.shape, told.pop("seconds"), error=told["logp_diff_max"], **told)]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.5
    setting.changed()
    found = setting.differences(results)
    red = {} if found["logp_diff_max"] > 0 else {"status": "wrong: a changed parameter is not seen"}
    rows.append(row("exact, one parameter of the trainer's changed", setting.shape, [], **found, **red))
    engine.weights_changed()
    told, results = setting.measure(1)
    told.pop("seconds")
    rows.append(row("exact, after the update", setting.shape, [], error=told["logp_diff_max"], **told))
    rows.append(row("exact: an update", setting.shape, setting.updates(results, rounds)))
    return rows


class Setting:
    """A model, its engine, and requests."""

    def __init__(self, quick: bool, device: str, exact: bool = False, config: Any = None):
        import transformers

        self.device, self.exact = device, exact
        self.agent_config: dict[str, Any] = {"fused_layers": "off"}
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
        from ilr_fast.engines.vllm import VllmEngine
        from ilr_fast.engines.vllm_core import CoreOptions, check_version
        from ilr_fast.engines.vllm_process import prepare_process

        check_version("bench")
        prepare_process(exact=self.exact)
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

    def own_logps(self) -> None:
        """From now on the engine's log-probs are `linear_logprob`'s."""
        from ilr_fast.attention import lm_head_of
        from ilr_fast.engines.vllm_logps import TrainersLogps

        TrainersLogps(self.engine._core.worker.model_runner, self.engine._core.model, lm_head_of(self.model))

    def _sequences(self, results: list[Generation]) -> list[TrainingSequence]:
        """One group a request, with advantages of both signs."""
        found = []
        for n, (prompt, result) in enumerate(zip(self.prompts, results, strict=True)):
            tokens = (*prompt, *result.tokens)
            turn = TrainingTurn(len(prompt), len(tokens), 1.0 if n % 2 else -1.0, result.logps)
            found.append(TrainingSequence(str(n), 0, tokens, (turn,)))
        return found


def _plain_logits(engine: Any) -> None:
    from ilr_fast.engines.vllm_logps import processors

    for processor in processors(engine._core.model):
        processor.__dict__.pop("_get_logits", None)


@contextmanager
def _rope_in_float32() -> Iterator[None]:
    """Queries and keys turned in float32 and rounded once."""
    from transformers.models.qwen2 import modeling_qwen2 as module

    turn = module.apply_rotary_pos_emb

    def changed(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any) -> Any:
        return tuple(x.to(q.dtype) for x in turn(q.float(), k.float(), cos.float(), sin.float(), *more))

    with _replaced(module, "apply_rotary_pos_emb", changed):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    Path(sys.argv[1]).write_text(json.dumps(exact_mode(bool(int(sys.argv[2])), int(sys.argv[3]))))
