"""What the start of the engine takes, part by part, and what it samples then: `fast_start` true and false.

    ilr-fast bench rollout_start      # one NVIDIA GPU with vLLM; two minutes

Each setting has a process of its own, since the first engine of a process decides for all of them, and an empty cache
of vLLM's compiler. A model with random weights, of Qwen2's 1.5B shape; 512 dialogues as in `bench rollout`, all in
flight. The parts are vLLM's own functions, each without those that it calls; what remains of the engine is the
config, the weights that become the trainer's, and the scheduler.

    python -m ilr_benchmarks.rollout_start '{"fast_start": true, "quick": false, "device": "cuda"}'
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from tempfile import TemporaryDirectory
from typing import Any

from ilr_benchmarks.common import row, without_vllm
from ilr_benchmarks.rollout_engine import error_of, options, speed, started, timed
from ilr_benchmarks.rollout_load import TURNS, Load, talk

TARGET = 25.0  # seconds, for `fast_start: true`
# vLLM's functions by what they do, the outer ones first.
PARTS = {
    "init_device": "the device",
    "load_model": "the model",
    "determine_available_memory": "a first pass (profiling)",
    "initialize_from_config": "keys and values",
    "compile_or_warm_up_model": "kernels are warmed up",
    "capture_model": "graphs are captured",
}


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows of each setting; a row with a status alone where vLLM is missing."""
    slots = 6 if quick else 512
    shape = f"{'small' if quick else 'Qwen2 1.5B'}, {slots} dialogues of {TURNS} turns, all in flight"
    if (missing := without_vllm("start", shape)) is not None:
        yield missing
        return
    for fast in (True, False):
        name = f"fast_start: {str(fast).lower()}"
        with TemporaryDirectory() as cache:
            told = _told(dict(fast_start=fast, quick=quick, device=device), cache)
        if "failed" in told:
            yield row(f"start, {name}", shape, [], status=f"failed: {told['failed'][-200:]}")
            continue
        seconds, work = told["seconds"], told["work"]
        wanted = dict(target=f"≤ {TARGET:g} s", met=seconds["all"] <= TARGET) if fast else {}
        yield row(f"start, {name}", shape, [seconds.pop("all")], **wanted)
        for part, value in seconds.items():
            yield row(f"start, {name}: {part}", shape, [value])
        yield row(f"dialogues, {name}", shape, work, error=told["error"], **speed(work, told["tokens"]))


def _told(given: dict[str, Any], cache: str) -> dict[str, Any]:
    """What a process with the setting measured; `failed` where it did not come to its end."""
    command = [sys.executable, "-m", "ilr_benchmarks.rollout_start", json.dumps(given)]
    caches = {"VLLM_CACHE_ROOT": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | caches, timeout=400)
    except subprocess.TimeoutExpired:
        return {"failed": "no end in 400 s"}
    answers = [line.removeprefix("answer ") for line in done.stdout.splitlines() if line.startswith("answer ")]
    return json.loads(answers[0]) if answers else {"failed": done.stderr}


def _main(given: dict[str, Any]) -> None:
    quick, device = given["quick"], given["device"]
    seconds: dict[str, float] = {}
    parts: dict[str, float] = {}
    settings = replace(options(6 if quick else 512, quick), fast_start=given["fast_start"])
    with_parts = _Parts(parts)
    engine, model = started(seconds, "qwen", settings, quick, device, imported=with_parts.watch)
    compiled = engine._core.worker.vllm_config.compilation_config.compilation_time
    whole = seconds.pop("the engine")
    weights = seconds.pop("random weights of the trainer")
    load = Load.drawn(model.config.vocab_size, settings.slots, settings.slots, 12 if quick else 512)
    error = error_of(engine, model)
    asyncio.run(talk(engine, load.cut(settings.slots, 8)))  # kernels are loaded and compiled
    work = [timed(lambda: asyncio.run(talk(engine, load)), engine) for _ in range(2)]
    seconds = {
        "all": whole + seconds["importing vLLM"],
        **seconds,
        **{PARTS[name]: parts[name] for name in PARTS if name in parts},
        "of the first pass, compilation": compiled,
        "the rest of the engine": whole - sum(parts.values()),
        "random weights of the trainer (not counted)": weights,
    }
    told = dict(seconds=seconds, work=work, tokens=load.generated, error=error)
    print(f"answer {json.dumps(told)}", flush=True)
    os._exit(0)  # the answer is there; vLLM's end takes seconds


class _Parts:
    """Seconds spent in vLLM's functions, each without those inside it that are counted too."""

    def __init__(self, seconds: dict[str, float]):
        self._seconds = seconds
        self._inside: list[float] = []  # of each function under way, what those in it took

    def watch(self) -> None:
        """From now on the worker's functions are timed; vLLM must be imported."""
        from vllm.platforms import current_platform
        from vllm.v1.worker.gpu_worker import Worker

        kinds: list[type] = [Worker]
        if current_platform.is_cpu():
            from vllm.v1.worker.cpu_worker import CPUWorker

            kinds.append(CPUWorker)
        for kind in kinds:
            for name in PARTS:
                if name in vars(kind):
                    setattr(kind, name, self._timed(name, vars(kind)[name]))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*arguments: Any, **named: Any) -> Any:
            if name == "compile_or_warm_up_model":
                runner = arguments[0].model_runner
                runner.capture_model = self._timed("capture_model", runner.capture_model)
            begun = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                took = time.perf_counter() - begun
                own = took - self._inside.pop()
                self._seconds[name] = self._seconds.get(name, 0.0) + own
                if self._inside:
                    self._inside[-1] += took

        return watched


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
