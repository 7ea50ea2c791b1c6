"""The dialogues of `bench rollout` beside vLLM as its users have it: its compiler, all its graphs, its own processes.

    ilr-fast bench rollout_defaults      # one NVIDIA GPU with vLLM; three and a half minutes for 1 round

`LLM.generate` (rollout_plain.py) gets as many turns and tokens, each after a prompt of 200 tokens, in one call, with
log-probs and without; and the dialogues stage by stage in batches of 512.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from typing import Any

from ilr_benchmarks.common import row
from ilr_benchmarks.rollout import plain_rows
from ilr_benchmarks.rollout_engine import error_of, options, speed, started, timed
from ilr_benchmarks.rollout_load import TURNS, Load, talk
from ilr_benchmarks.rollout_plain import own_defaults

from ilr_fast.errors import UserError


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows; a row with a status alone where vLLM is missing."""
    slots = 6 if quick else 512
    shape = f"{'small' if quick else 'Qwen2 1.5B'}, {2 * slots} dialogues of {TURNS} turns, {slots} in flight"
    settings = options(slots, quick)
    try:
        engine, model = started({}, "qwen", settings, quick, device)
    except UserError as error:
        yield row("dialogues by the engine", shape, [], status=str(error).splitlines()[0])
        return
    load = Load.drawn(model.config.vocab_size, 2 * slots, slots, 12 if quick else 512)
    error = error_of(engine, model)
    asyncio.run(talk(engine, load.cut(slots, 8)))
    ours = [timed(lambda: asyncio.run(talk(engine, load)), engine) for _ in range(rounds + 1)]
    yield row("dialogues by the engine", shape, ours, error=error, **speed(ours, load.generated))
    engine.close()
    if only_ours:
        return
    try:
        found = own_defaults("qwen", settings, load, rounds, quick, device)
    except (RuntimeError, subprocess.TimeoutExpired) as failure:
        yield row("plain LLM.generate: its own defaults", shape, [], status=f"failed: {str(failure)[-200:]}")
        return
    yield from plain_rows(found.items(), "its own defaults", load, shape, ours)
