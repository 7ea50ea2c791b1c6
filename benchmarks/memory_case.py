"""One run of `bench memory`, in a process of its own: prints a line of JSON for each phase.

python -m ilr_benchmarks.memory_case '{"config": "configs/24gb/grpo_3b_full.yaml", …}'
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ilr_benchmarks.shapes import small_shape, write_shape
from ilr_kernels import product_plan

import ilr_fast.hosts.local  # noqa: F401 (imported before the card is used)
from ilr_fast.card import PeakSampler
from ilr_fast.config import Config
from ilr_fast.config_parse import load_config
from ilr_fast.fill_in import fill_in
from ilr_fast.memory import GIB
from ilr_fast.metrics import Timer
from ilr_fast.plan import Machine, RunPlan, plan_run
from ilr_fast.plan_command import filled, shapes_of
from ilr_fast.team import open_team, prepare_chats
from ilr_fast.types import Sampling, TrainingSequence, TrainingTurn

STEPS = 2
RTX_4090 = 89, 101376, 128  # compute capability 8.9, bytes of shared memory of a block, processors


def main(asked: dict[str, Any]) -> None:
    if asked["ada"]:
        product_plan._properties = lambda device: RTX_4090  # type: ignore[assignment]
    config, planned = _settled(asked)
    chats = prepare_chats(config)
    wait_for_the_card()
    with ExitStack() as stack:
        sampler = stack.enter_context(PeakSampler(interval=0.005))
        begun = time.perf_counter()
        team = stack.enter_context(open_team(config, chats))
        say = _Speaker(planned, sampler)
        say("load", [time.perf_counter() - begun])
        seconds: dict[str, list[float]] = {}
        for step in range(1, STEPS + 1):
            _step(team, config, asked, step, seconds, say)


def wait_for_the_card() -> None:
    """Says `ready` and waits for a line: nothing that takes memory of the card has been done yet."""
    print("ready", flush=True)
    sys.stdin.readline()


def _step(
    team: Any, config: Config, asked: dict[str, Any], step: int, seconds: dict[str, list[float]], say: Any
) -> None:
    last, begun, timer = step == STEPS, time.perf_counter(), Timer()
    team.measure(timer)
    hosts, draw = team.hosts, random.Random(step)
    contexts = {name: host.max_context for name, host in hosts.items()}
    words = {name: _words(draw, asked["vocabulary"][name]) for name in hosts}

    def timed(phase: str, work: Callable[[], Any]) -> None:
        start = time.perf_counter()
        work()
        seconds.setdefault(phase, []).append(time.perf_counter() - start)

    async def generate() -> None:
        jobs = []
        for name, host in hosts.items():
            prompts = [words[name](contexts[name] - asked["tokens"]) for _ in range(2)]
            for n in range(config.agents[name].engine.slots):
                sampling = Sampling(asked["tokens"], seed=n)
                jobs.append(host.generate(prompts[n % 2], sampling))
        for generation in await asyncio.gather(*jobs):
            assert generation.finish != "error", generation.error

    timed("generate", lambda: asyncio.run(generate()))
    team.forget()  # as training does
    say("generate", seconds["generate"], quiet=not last, tokens=_generated(config, asked))
    results: list[Any] = []
    for name, host in hosts.items():
        phase = f"update {name}"
        length = _length(config.agents[name].batch_tokens, contexts[name])
        batch = [sequence(words[name](length), n, draw) for n in range(asked["sequences"])]
        timed(phase, lambda host=host, batch=batch: results.append(host.update(batch, step)))
        say(phase, seconds[phase], quiet=not last, tokens=sum(len(s.tokens) for s in batch), note=results[-1].note)
    seconds.setdefault("step", []).append(time.perf_counter() - begun)
    seconds.setdefault("swap", []).append(timer.seconds()["swap"] or 0.0)
    if last:
        say("whole step", seconds["step"], swap_seconds=[round(s, 3) for s in seconds["swap"]])


def _generated(config: Config, asked: dict[str, Any]) -> int:
    return sum(agent.engine.slots for agent in config.agents.values()) * asked["tokens"]


def _length(tokens: int, context: int) -> int:
    """Of sequences that fill micro-batches of so many tokens, as conversations of all lengths nearly do."""
    return max(tokens, context) // -(-tokens // context)


def _words(draw: random.Random, vocabulary: int) -> Callable[[int], list[int]]:
    return lambda count: [draw.randrange(3, vocabulary) for _ in range(count)]


def sequence(tokens: list[int], number: int, draw: random.Random) -> TrainingSequence:
    """All but a prompt sampled, in one turn."""
    start = min(512, len(tokens) // 4)
    turn = TrainingTurn(start, len(tokens), draw.choice([-1.0, 1.0]), (-2.0,) * (len(tokens) - start))
    return TrainingSequence(f"q{number % 2}", number, tuple(tokens), (turn,))


class _Speaker:
    """Prints what a phase took, by plan and by NVML; `quiet` only takes the peak into account."""

    def __init__(self, planned: RunPlan, sampler: PeakSampler):
        device = planned.devices[0] if planned.devices else planned.host
        self._planned = {phase.name: phase.total for phase in device.phases}
        turns = [size for name, size in self._planned.items() if name.startswith("generate")]
        self._planned["generate"] = max(turns)  # agents that take turns have a phase each
        self._sampler = sampler
        self._peaks: dict[str, int] = {}

    def __call__(
        self, phase: str, seconds: list[float], *, quiet: bool = False, tokens: int | None = None, **more: Any
    ) -> None:
        peak = self._sampler.take()
        if peak is not None:
            self._peaks[phase] = max(peak, self._peaks.get(phase, 0))
        by_torch = _by_torch()
        if quiet:
            return
        found = self._peaks.get(phase)
        planned = self._planned.get(phase)
        told = {
            "phase": phase, "seconds": [round(s, 3) for s in seconds],
            "planned_gib": None if planned is None else round(planned / GIB, 2),
            "measured_gib": None if found is None else round(found / GIB, 2),
            "torch_gib": by_torch,
            "tokens_per_second": None if tokens is None else round(tokens / seconds[-1], 1), **more,
        }  # fmt: skip
        print(json.dumps(told), flush=True)


def _by_torch() -> float | None:
    """The most that PyTorch has allocated since the last call."""
    import torch

    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return round(peak / GIB, 2)


def _settled(asked: dict[str, Any]) -> tuple[Config, RunPlan]:
    """The config with shapes in place of models, filled in for the card."""
    config = with_shapes(load_config(asked["config"]), Path(asked["folder"]), quick=asked["quick"])
    asked["vocabulary"] = {
        name: json.loads((Path(agent.model) / "config.json").read_text())["vocab_size"]
        for name, agent in config.agents.items()
    }
    shapes, size = shapes_of(config), int(asked["gib"] * GIB)
    on_cpu = not _cuda()
    machine = Machine({} if on_cpu else {"cuda:0": size}, None)
    settled = fill_in(config, shapes, machine)
    print("auto:", *filled(config, settled), file=sys.stderr)
    contexts = {name: agent.engine.max_context or 0 for name, agent in settled.agents.items()}
    return settled, plan_run(settled, shapes, machine, contexts)


def with_shapes(config: Config, folder: Path, *, quick: bool) -> Config:
    """The config with random weights of its models' shapes, written to `folder`; `quick`: of small ones."""
    agents = {}
    for name, agent in config.agents.items():
        made = (small_shape if quick else write_shape)(agent.model, folder)
        engine = replace(agent.engine, max_context=512, slots=4) if quick else agent.engine
        if quick and engine.cache_gib:
            engine = replace(engine, cache_gib=0.1)
        agents[name] = replace(agent, model=str(made), random_weights=True, chat_template="plain", engine=engine)
    return replace(config, agents=agents, memory_check="warn")


def _cuda() -> bool:
    from ilr_fast.card import card_memory

    return bool(card_memory())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
