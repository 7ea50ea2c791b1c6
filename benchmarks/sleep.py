"""Two agents with vLLM in one process on one GPU: what it takes to give memory back and to take it again.

    ilr-fast bench sleep        # one NVIDIA GPU with vLLM; about two minutes

Models of Qwen2's 1.5B and Llama's 1B shape with random weights in bfloat16, which trainers and engines share, and CUDA
graphs. First what must hold: while one agent is away the other samples what it did before; weights come back bit for
bit; the cache comes back empty; an optimizer step while the cache is gone is what the engine samples from, and its
log-probs are the trainer's as before. Then the times, with the bytes that the device says were freed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ilr_benchmarks.common import row
from ilr_benchmarks.rollout_load import NoText, random_model

from ilr_fast.errors import UserError
from ilr_fast.types import Residence, Sampling

UPDATE = 1.2  # seconds: the target
REQUESTS, PROMPT, SAMPLED = 16, 48, 24


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> list[dict[str, Any]]:
    """Rows of what must hold, then of the times; a row with a status alone where vLLM is missing."""
    shape = f"{'small' if quick else 'Qwen2 1.5B and Llama 1B'}, shared weights, both in one process"
    try:
        start = time.perf_counter()
        agents = [_Agent(kind, quick, device) for kind in ("qwen", "llama")]
        begun = time.perf_counter() - start
    except UserError as error:
        return [row("sleep", shape, [], status=str(error).splitlines()[0])]
    rows = [row("start of both engines", shape, [begun])]
    checks = {**_away(*agents), **_updated(agents[0])}
    rows += [row(name, shape, [], **told) for name, told in checks.items()]
    if not any(told["status"].startswith("wrong") for told in checks.values()):
        rows += _times(agents[0], shape, min(rounds, 5))
    return rows


class _Agent:
    """A model, its engine and its optimizer."""

    def __init__(self, kind: str, quick: bool, device: str):
        from ilr_fast.config import OptimizerConfig
        from ilr_fast.engines.vllm import VllmEngine
        from ilr_fast.engines.vllm_core import CoreOptions, check_version
        from ilr_fast.optimizer import Optimizer

        check_version("bench")
        self.device = torch.device(device)
        self.model = _model(kind, quick, device)
        options = CoreOptions(slots=REQUESTS, max_context=1024, cache_gib=0.1 if quick else 8.0, sleeps=True)
        self.engine = VllmEngine(self.model, NoText(), options=options, where="bench")
        rounding = {} if device == "cpu" else {"rounding": "stochastic", "moments": "bfloat16"}
        named = list(self.model.named_parameters())
        self.optimizer = Optimizer(named, OptimizerConfig(lr=1e-4, **rounding), steps=100)
        vocabulary = self.model.config.vocab_size
        self.prompts = np.random.default_rng(1).integers(0, vocabulary, (REQUESTS, PROMPT)).tolist()

    def sample(self, temperature: float = 1.0) -> list[Any]:
        """Every prompt's generation, all at once."""

        async def all_of_them() -> list[Any]:
            wanted = [Sampling(SAMPLED, temperature=temperature, seed=n) for n in range(REQUESTS)]
            return await asyncio.gather(
                *(self.engine.generate(p, s) for p, s in zip(self.prompts, wanted, strict=True))
            )

        return asyncio.run(all_of_them())

    @torch.inference_mode()
    def difference(self) -> tuple[float, float]:
        """Mean and largest |trainer's − engine's log-prob| over sampled tokens."""
        found = []
        for prompt, result in zip(self.prompts, self.sample(), strict=True):
            if result.error:
                raise RuntimeError(result.error)
            tokens = torch.tensor([prompt + list(result.tokens)], device=self.device)
            logits = self.model(tokens).logits[0, len(prompt) - 1 : -1].float()
            own = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
            found.append((own.cpu() - torch.tensor(result.logps)).abs())
        difference = torch.cat(found)
        return float(difference.mean()), float(difference.max())

    def learn(self) -> None:
        """One optimizer step on random gradients."""
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        self.optimizer.step(1)

    def reside(self, residence: Residence) -> None:
        self.engine.reside(residence)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> int:
        """Bytes that the device has free, 0 on the CPU."""
        if self.device.type == "cpu":
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


def _model(kind: str, quick: bool, device: str) -> Any:
    model = random_model(kind, device, quick)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # log-probs of some nats
            torch.nn.init.normal_(parameter, std=0.2 if quick else 0.04)
    return model


def _away(ada: _Agent, bob: _Agent) -> dict[str, dict[str, Any]]:
    """One is away while the other generates; its weights and its samples afterwards."""
    before, weights = bob.sample(), {n: p.detach().cpu() for n, p in ada.model.named_parameters()}
    said, reused = ada.sample(0.0), ada.engine.stats().tokens_reused
    free = ada.free()
    ada.reside("away")
    freed = ada.free() - free
    bob.engine.forget()
    during = bob.sample()
    bob.reside("training")
    ada.reside("awake")
    same = all(torch.equal(weights[n], p.detach().cpu()) for n, p in ada.model.named_parameters())
    again = ada.sample(0.0)
    bob.reside("awake")
    after = bob.sample()
    emptied = ada.engine.stats().tokens_reused == reused
    return {
        "the other generates as before": _told(
            [g.tokens for g in before] == [g.tokens for g in during] == [g.tokens for g in after]
        ),
        "weights come back bit for bit": _told(same, bytes=sum(w.nbytes for w in weights.values())),
        "the cache comes back empty": _told(emptied),
        "greedy samples are the same after it": _told([g.tokens for g in said] == [g.tokens for g in again]),
        "memory of an agent that is away": _told(True, freed_gib=freed / 2**30),
    }


def _updated(ada: _Agent) -> dict[str, dict[str, Any]]:
    """An optimizer step while keys and values are gone, and a change that flips what is greedily sampled."""
    before, said = ada.difference(), ada.sample(0.0)
    ada.reside("training")
    ada.learn()
    with torch.no_grad():
        ada.model.model.layers[0].self_attn.v_proj.weight.mul_(-3)
    ada.engine.weights_changed()
    ada.reside("away")
    ada.reside("awake")
    reused = ada.engine.stats().tokens_reused
    after = ada.difference()
    fresh = ada.engine.stats().tokens_reused == reused
    now = ada.sample(0.0)
    limit = max(2 * before[0], 1e-4)
    return {
        "a change that flips the sample is seen": _told(
            fresh and sum(a.tokens[0] != b.tokens[0] for a, b in zip(said, now, strict=True)) > 0
        ),
        "log-probs of trainer and engine, before": _told(True, mean=before[0], most=before[1]),
        "log-probs of trainer and engine, after": _told(after[0] <= limit, mean=after[0], most=after[1]),
    }


def _told(holds: bool, **more: Any) -> dict[str, Any]:
    return {"status": "holds" if holds else "wrong", **more}


def _times(ada: _Agent, shape: str, rounds: int) -> list[dict[str, Any]]:
    """Each way of giving memory back and of taking it again."""
    found: dict[str, list[float]] = {}
    freed: dict[str, int] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        free = ada.free()
        start = time.perf_counter()
        work()
        if ada.device.type == "cuda":
            torch.cuda.synchronize()
        found.setdefault(name, []).append(time.perf_counter() - start)
        freed[name] = ada.free() - free

    for _ in range(rounds):
        timed("release keys and values", lambda: ada.reside("training"))
        timed("restore keys and values", lambda: ada.reside("awake"))
        ada.engine.weights_changed()
        timed("release all, weights have changed", lambda: ada.reside("away"))
        timed("restore all", lambda: ada.reside("awake"))
        # Nothing has changed since they were copied out, as with frozen weights.
        ada.engine.reside("training")
        timed("release weights that were copied out before", lambda: ada.reside("away"))
        timed("restore weights", lambda: ada.reside("training"))
        ada.reside("awake")
        for parameter in ada.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        timed("update: optimizer step, sleep, wake, cache reset", lambda: _update(ada))
    target = {"target": f"≤ {UPDATE} s"}
    return [
        row(
            name, shape, seconds, freed_gib=freed[name] / 2**30,
            **({**target, "met": bool(np.median(seconds) <= UPDATE)} if name.startswith("update") else {}),
        )
        for name, seconds in found.items()
    ]  # fmt: skip


def _update(ada: _Agent) -> None:
    ada.reside("training")
    ada.optimizer.step(1)
    ada.engine.weights_changed()
    ada.reside("awake")
