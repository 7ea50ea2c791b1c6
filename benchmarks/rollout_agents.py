"""Two agents of different families on one GPU: both at the same time, and one after the other.

    ilr-fast bench rollout_agents      # one NVIDIA GPU with vLLM; three minutes for 3 rounds

Models with random weights, of Qwen2's 1.5B and Llama 3.2's 1B shape, and 256 dialogues each as in `bench rollout`, all
in flight: with a process for each agent, as under `host: process`, clients of one MPS server where one can be
started (ilr_fast/hosts/sharing.py; else they take turns on the GPU), which keep step (ilr_fast/engines/pace.py); and
with both engines in one process, driven by one event loop, the second one on a CUDA stream of its own. Every round
times both ways: each agent alone, then both. Both at the same time are held against the faster way of one after the
other, and against what is done without such an engine: one after the other, stage by stage with a barrier after each.
At last 128 dialogues each in one process.

    python -m ilr_benchmarks.rollout_agents '{"family": "qwen", "slots": 256, …}'    # a process: runs for every line
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ilr_benchmarks.common import row, without_vllm
from ilr_benchmarks.rollout_engine import error_of, options, ratio, speed, started, timed
from ilr_benchmarks.rollout_load import TURNS, Load, in_stages, talk

from ilr_fast.hosts.sharing import PIPES, served

TARGET = 1.1
Row = dict[str, Any]
Way = tuple[list[Callable[[], float]], Callable[[], float]]  # each agent alone, and both
Times = list[list[float]]
FAMILIES = ("qwen", "llama")


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows; a row with a status alone where vLLM is missing."""
    slots, rounds = 3 if quick else 256, min(rounds, 3)
    shape = _shape(slots, quick)
    if (missing := without_vllm("both at the same time", shape)) is not None:
        yield missing
        return
    with _processes(slots, quick, device) as (way, processes):
        engines = [started({}, family, options(slots, quick), quick, device) for family in FAMILIES]
        work = [(engine, _load(model, slots, quick)) for engine, model in engines]
        told = [json.loads(_answer(process)) for process in processes]  # they have warmed up
        ways = {way: _two_processes(processes), "one process": _one_process(work)}
        times = _timed(ways, rounds)
    tokens = [load.generated for _, load in work]
    for how in ways:
        yield from _rows(how, shape, tokens, times[how])
    after = min((_sums(times[how]) for how in ways), key=np.median)
    for how in ways:
        both = [seconds[-1] for seconds in times[how]]
        yield from ratio(f"both, {how}, beside the faster way of one after the other", shape, after, both, TARGET)
    for family, one, (engine, model) in zip(FAMILIES, told, engines, strict=True):
        yield row(f"{family}, {way}", shape, [], error=one["error"], status="right")
        yield row(f"{family} beside the other engine", shape, [], error=error_of(engine, model), status="right")
    stages = [sum(timed(lambda one=one: asyncio.run(in_stages(*one)), one[0]) for one in work)]
    yield row("one after the other, stage by stage with barriers", shape, stages, **speed(stages, sum(tokens)))
    both = min(([seconds[-1] for seconds in times[how]] for how in ways), key=np.median)
    yield from ratio("both, the faster way, beside stage by stage with barriers", shape, stages, both)
    if only_ours:
        return
    fewer = [(engine, _load(model, slots // 2, quick)) for engine, model in engines]
    times = _timed({"one process": _one_process(fewer)}, rounds)
    half = [load.generated for _, load in fewer]
    yield from _rows("one process", _shape(slots // 2, quick), half, times["one process"])


@contextlib.contextmanager
def _processes(slots: int, quick: bool, device: str) -> Iterator[tuple[str, list[Any]]]:
    """How processes share the GPU, and a process for each agent."""
    given = dict(slots=slots, quick=quick, device=device)
    with served(device == "cuda") as environment, contextlib.ExitStack() as stack:
        way = "a process each" + (", MPS" if PIPES in environment else "")
        processes = [_process({"family": family, **given}, environment) for family in FAMILIES]
        for process in processes:
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield way, processes


def _shape(dialogues: int, quick: bool) -> str:
    return f"{'small' if quick else 'Qwen2 1.5B and Llama 1B'}, {dialogues} dialogues of {TURNS} turns each"


def _timed(ways: dict[str, Way], rounds: int) -> dict[str, Times]:
    """Of each way and round, the seconds of each agent alone, then of both."""
    for _, both in ways.values():
        both()  # whatever is loaded or compiled first
    times: dict[str, Times] = {how: [] for how in ways}
    for _ in range(rounds):
        for how, (alone, both) in ways.items():
            times[how].append([one() for one in (*alone, both)])
    return times


def _sums(times: Times) -> list[float]:
    return [sum(seconds[:-1]) for seconds in times]


def _rows(how: str, shape: str, tokens: list[int], times: Times) -> Iterator[Row]:
    """Each agent alone, one after the other, and both."""
    columns = [list(column) for column in zip(*times, strict=True)]
    for family, seconds, generated in zip(FAMILIES, columns, tokens, strict=False):
        yield row(f"{family} alone, {how}", shape, seconds, **speed(seconds, generated))
    after = _sums(times)
    yield row(f"one after the other, {how}", shape, after, **speed(after, sum(tokens)))
    yield row(f"both at the same time, {how}", shape, columns[-1], **speed(columns[-1], sum(tokens)))
    yield from ratio(f"both beside one after the other, {how}", shape, after, columns[-1], TARGET)


def _one_process(work: list[tuple[Any, Load]]) -> Way:
    async def together() -> None:
        await asyncio.gather(*(talk(engine, load) for engine, load in work))

    alone = [lambda one=engine, its=load: timed(lambda: asyncio.run(talk(one, its)), one) for engine, load in work]
    return alone, lambda: timed(lambda: asyncio.run(together()), *(engine for engine, _ in work))


def _two_processes(processes: list[Any]) -> Way:
    def at_once(some: list[Any]) -> float:
        def go() -> None:
            for process in some:
                process.stdin.write("go\n")
                process.stdin.flush()
            for process in some:
                _answer(process)

        return timed(go)

    return [lambda one=process: at_once([one]) for process in processes], lambda: at_once(processes)


def _load(model: Any, slots: int, quick: bool) -> Load:
    return Load.drawn(model.config.vocab_size, slots, slots, 12 if quick else 512)


def _process(given: dict[str, Any], environment: dict[str, str]) -> Any:
    command = [sys.executable, "-m", "ilr_benchmarks.rollout_agents", json.dumps(given)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )


def _answer(process: Any) -> str:
    """What the process says next; RuntimeError where it has ended."""
    for line in process.stdout:
        if line.startswith("answer "):
            return str(line.removeprefix("answer "))
    raise RuntimeError(f"an agent's process ended with status {process.wait()}")


def _main(given: dict[str, Any]) -> None:
    """A process of one agent: tells its dialogues' tokens and its error, and runs them for every line that it reads."""
    settings = options(given["slots"], given["quick"])
    engine, model = started({}, given["family"], settings, given["quick"], given["device"])
    load = _load(model, given["slots"], given["quick"])
    told = dict(tokens=load.generated, error=error_of(engine, model))
    print(f"answer {json.dumps(told)}", flush=True)
    for _ in sys.stdin:
        print(f"answer {timed(lambda: asyncio.run(talk(engine, load)), engine)}", flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
