"""Rollouts by vLLM in the trainer's process: dialogues of three turns without barriers beside plain `LLM.generate`.

    ilr-fast bench rollout      # one NVIDIA GPU with vLLM; some three minutes for 3 rounds

A model with random weights, of Qwen2's 1.5B shape. Every dialogue has a prompt of 200 tokens and three turns of forced
length, log-normal with mean 200, at most 512, from a fixed seed; before the second and third turn it is given 60 tokens
more. 512 of 1,024 dialogues are in flight. Beside them, with the same slots:

- the same dialogues by our engine, but stage by stage in batches of 512, with a barrier after each stage;
- vLLM by itself, `LLM.generate` with our settings (rollout_plain.py): as many turns and tokens, each after a prompt of
  200 tokens, in one call; and the dialogues stage by stage in batches of 512;
- what an update costs until the engine has it, what the start takes, what the weights take beside the trainer's;
- the GPU's idle share over some steps, from the times of all kernels, and what the host did (rollout_idle.py).

All give log-probs; those of some sequences are held against the trainer's own forward pass. Rows come as they are made.
Two agents at once are measured by `ilr-fast bench rollout_agents`, vLLM with its own defaults by `rollout_defaults`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from ilr_benchmarks.common import row
from ilr_benchmarks.rollout_engine import error_of, options, ratio, speed, started, timed
from ilr_benchmarks.rollout_idle import FULL, LATE, measured
from ilr_benchmarks.rollout_load import TURNS, Load, in_stages, talk
from ilr_benchmarks.rollout_plain import same_settings

from ilr_fast.errors import UserError

TARGETS = {"plain": 0.95, "stages": 1.3, "update": 0.05, "start": 25.0, "idle": 0.1}
PLAIN_ROUNDS = 1  # of each of its ways
GIB = 2**30


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows, the most important ones first; a row with a status alone where vLLM is missing."""
    rounds = min(rounds, 3)
    slots = 6 if quick else 512
    shape = f"{'small' if quick else 'Qwen2 1.5B'}, {2 * slots} dialogues of {TURNS} turns, {slots} in flight"
    seconds: dict[str, float] = {}
    try:
        engine, model = started(seconds, "qwen", options(slots, quick), quick, device)
    except UserError as error:
        yield row("dialogues by the engine", shape, [], status=str(error).splitlines()[0])
        return
    load = Load.drawn(model.config.vocab_size, 2 * slots, slots, 12 if quick else 512)
    error = error_of(engine, model)
    asyncio.run(talk(engine, load.cut(slots, 8)))  # kernels are loaded and compiled
    ours, hits = [], []
    for _ in range(rounds):
        before = engine.stats()
        ours.append(timed(lambda: asyncio.run(talk(engine, load)), engine))
        after = engine.stats()
        hits.append((after.tokens_reused - before.tokens_reused) / (after.tokens_prompt - before.tokens_prompt))
    more = dict(error=error, prefix_hits=float(np.median(hits)), **speed(ours, load.generated))
    yield row("dialogues by the engine", shape, ours, **more)
    yield from _weights(engine, model, shape)
    yield from _start(seconds, shape)
    if device == "cuda":
        yield from _idle(engine, load, FULL, "", shape)
    if only_ours:
        return
    settings, plain_rounds = options(slots, quick), min(rounds, PLAIN_ROUNDS)
    plain = same_settings(model, settings, load, plain_rounds, device)
    yield from plain_rows(plain, "same settings", load, shape, ours)
    stages = [timed(lambda: asyncio.run(in_stages(engine, load)), engine) for _ in range(rounds)]
    yield row("by our engine, stage by stage", shape, stages, **speed(stages, load.generated))
    yield from ratio("dialogues beside our engine's stages", shape, stages, ours)
    if device == "cuda":
        yield from _idle(engine, load, LATE, ", late", shape)


def plain_rows(
    found: Iterable[tuple[str, list[float]]], name: str, load: Load, shape: str, ours: list[float]
) -> Iterator[dict[str, Any]]:
    """vLLM by itself, and ours beside it."""
    how = {"one_call": "one call", "stages": "stages", "no_logps": "one call, no log-probs"}
    for key, seconds in found:
        if key == "start":
            yield row(f"start: plain LLM, {name}", shape, seconds)
            continue
        yield row(f"plain LLM.generate, {how[key]}: {name}", shape, seconds, **speed(seconds, load.generated))
        target = TARGETS["stages" if key == "stages" else "plain"]
        yield from ratio(f"dialogues beside {how[key]}: {name}", shape, seconds, ours, target)


def _start(seconds: dict[str, float], shape: str) -> Iterator[dict[str, Any]]:
    total = sum(seconds.values()) - seconds["random weights of the trainer"]
    met = bool(total <= TARGETS["start"])
    yield row("start: importing vLLM and the engine", shape, [total], target=f"≤ {TARGETS['start']:g} s", met=met)
    for name, value in seconds.items():
        yield row(f"start: {name}", shape, [value])


def _weights(engine: Any, model: Any, shape: str) -> Iterator[dict[str, Any]]:
    """An update of every weight until the engine has it, and the memory of both models' weights beyond one copy."""
    update = [timed(lambda: _update(engine, model)) for _ in range(5)]
    met = bool(np.median(update) <= TARGETS["update"])
    copied = 0 if engine.shares else sum(p.nbytes for p in model.parameters())
    yield row(
        "an update until the engine has it",
        shape,
        update,
        target=f"≤ {TARGETS['update']} s",
        met=met,
        extra_gib=engine.extra_weight_bytes() / GIB,
        bytes_copied=copied,
    )


def _idle(engine: Any, load: Load, first: int, when: str, shape: str) -> Iterator[dict[str, Any]]:
    """The GPU's idle share after `first` steps, and what the host did in a step and while the GPU had nothing to do."""
    found = measured(engine, load, first)
    yield row(
        f"idle share of the GPU while dialogues run{when}",
        shape,
        [],
        share=found.share,
        share_profiled=found.profiled,
        met=found.share <= TARGETS["idle"],
        target=f"≤ {TARGETS['idle']}",
        status=f"{found.share:.3f}",
    )
    more = dict(kernels_ms=found.busy, host_ms=found.host, idle_ms=found.gaps)
    yield row(f"a step{when}", shape, [found.step / 1e3], **more)


def _update(engine: Any, model: Any) -> None:
    """Every weight is written in place and the engine told."""
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.999)
    engine.weights_changed()
