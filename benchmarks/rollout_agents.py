"""Two agents of different families on one GPU: both at the same time, and one after the other.

    ilr-fast bench rollout_agents      # one NVIDIA GPU with vLLM; three minutes for 3 rounds

Models with random weights, of Qwen2's 1.5B and Llama 3.2's 1B shape, and 256 dialogues each as in `bench rollout`, all
in flight: with a process for each agent, as under `host: process`, clients of one MPS server where one can be
started (ilr_fast/hosts/sharing.py; else they take turns on the GPU); and with both engines in one process, driven by
one event loop, the second one on a CUDA stream of its own. Every round times each agent alone, then both; the processes
are held against the faster way of one after the other. At last 128 dialogues each in one process.

    python -m ilr_benchmarks.rollout_agents '{"family": "qwen", "slots": 256, …}'    # a process: runs for every line
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
from ilr_benchmarks.common import row
from ilr_benchmarks.rollout_engine import error_of, options, ratio, speed, started, timed
from ilr_benchmarks.rollout_load import TURNS, Load, talk

from ilr_fast.errors import UserError
from ilr_fast.hosts.sharing import served

TARGET = 1.1
Row = dict[str, Any]
Times = tuple[list[float], list[float]]
FAMILIES = ("qwen", "llama")


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows; a row with a status alone where vLLM is missing."""
    from ilr_fast.engines.vllm_core import check_version

    slots, rounds = 3 if quick else 256, min(rounds, 3)
    shape = _shape(slots, quick)
    try:
        check_version("bench")
    except UserError as error:
        yield row("both at the same time", shape, [], status=str(error).splitlines()[0])
        return
    apart, way = yield from _apart(slots, rounds, quick, device)
    work, fewer, errors = [], [], []
    for family in FAMILIES:
        engine, model = started({}, family, options(slots, quick), quick, device)
        work.append((engine, _load(model, slots, quick)))
        fewer.append((engine, _load(model, slots // 2, quick)))
        errors.append(lambda engine=engine, model=model: error_of(engine, model))
    tokens = [load.generated for _, load in work]
    after, _ = yield from _rows("one process", shape, rounds, tokens, *_one_process(work))
    faster = min(after, apart[0], key=np.median)
    yield from ratio(f"both, {way}, beside the faster way of one after the other", shape, faster, apart[1], TARGET)
    for family, error in zip(FAMILIES, errors, strict=True):
        yield row(f"{family} beside the other engine", shape, [], error=error(), status="right")
    if only_ours:
        return
    half = [load.generated for _, load in fewer]
    yield from _rows("one process", _shape(slots // 2, quick), rounds, half, *_one_process(fewer))


def _apart(slots: int, rounds: int, quick: bool, device: str) -> Generator[Row, None, tuple[Times, str]]:
    """Rows of a process each; the seconds of one after the other and of both, and how the GPU was shared."""
    shape, given = _shape(slots, quick), dict(slots=slots, quick=quick, device=device)
    with served(device == "cuda") as environment, contextlib.ExitStack() as stack:
        way = "a process each" + (", MPS" if environment else "")
        processes = [_process({"family": family, **given}, environment) for family in FAMILIES]
        for process in processes:
            stack.callback(process.wait)
            stack.callback(process.kill)
        told = [json.loads(_answer(process)) for process in processes]  # they have warmed up
        times = yield from _rows(way, shape, rounds, [one["tokens"] for one in told], *_two_processes(processes))
        for family, one in zip(FAMILIES, told, strict=True):
            yield row(f"{family}, {way}", shape, [], error=one["error"], status="right")
    return times, way


def _shape(dialogues: int, quick: bool) -> str:
    return f"{'small' if quick else 'Qwen2 1.5B and Llama 1B'}, {dialogues} dialogues of {TURNS} turns each"


def _rows(
    how: str, shape: str, rounds: int, tokens: list[int], alone: list[Callable[[], float]], both: Callable[[], float]
) -> Generator[Row, None, Times]:
    """Every round times each agent alone, then both; the seconds of one after the other, and of both."""
    both()  # whatever is loaded or compiled first
    times: list[list[float]] = [[one() for one in (*alone, both)] for _ in range(rounds)]
    columns = [list(column) for column in zip(*times, strict=True)]
    for family, seconds, generated in zip(FAMILIES, columns, tokens, strict=False):
        yield row(f"{family} alone, {how}", shape, seconds, **speed(seconds, generated))
    after = [sum(seconds[:-1]) for seconds in times]
    yield row(f"one after the other, {how}", shape, after, **speed(after, sum(tokens)))
    yield row(f"both at the same time, {how}", shape, columns[-1], **speed(columns[-1], sum(tokens)))
    yield from ratio(f"both beside one after the other, {how}", shape, after, columns[-1], TARGET)
    return after, columns[-1]


def _one_process(work: list[tuple[Any, Load]]) -> tuple[list[Callable[[], float]], Callable[[], float]]:
    async def together() -> None:
        await asyncio.gather(*(talk(engine, load) for engine, load in work))

    alone = [lambda one=engine, its=load: timed(lambda: asyncio.run(talk(one, its)), one) for engine, load in work]
    return alone, lambda: timed(lambda: asyncio.run(together()), *(engine for engine, _ in work))


def _two_processes(processes: list[Any]) -> tuple[list[Callable[[], float]], Callable[[], float]]:
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
