"""Variants of an ablation side by side, each as an `ilr-fast train` in a process of its own.

A process reads its config from `configs/NAME.yaml` in the ablation's folder and writes `logs/NAME.log` there. One that
fails does not stop the others. Where this process is interrupted (SIGINT, SIGTERM) it interrupts them, so that each
writes a checkpoint; a second signal kills them. Where it is killed, the kernel interrupts them (Linux).

    python -m ilr_fast.ablate_jobs PARENT_PID train FILE      # such a process
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ilr_fast.config import Config
from ilr_fast.config_parse import dump
from ilr_fast.durable import disk_errors, write_text
from ilr_fast.interrupt import Interrupt
from ilr_fast.parent import die_with

PATIENCE = 60.0  # seconds in which an interrupted process may write its checkpoint
_POLL = 0.1


@dataclass(frozen=True, slots=True)
class _Running:
    name: str
    process: subprocess.Popen
    started: float


def run_side_by_side(configs: Sequence[Config], jobs: int, folder: Path, console: Console) -> list[str]:
    """Trains the configs, at most `jobs` at a time, in their order; returns the names of those that failed."""
    waiting, running, failed = list(configs), list[_Running](), list[str]()
    total, ended = len(waiting), 0
    for part in ("configs", "logs"):
        with disk_errors(folder, "free some space and give the command again"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    with Interrupt() as interrupt:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    with interrupt.held():  # none is begun that is not in the list
                        running.append(_start(waiting.pop(0), min(jobs, total), folder))
                time.sleep(_POLL)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    ended += 1
                    code = one.process.returncode
                    if code:
                        failed.append(one.name)
                    said = f"{f'failed (exit {code})' if code else 'done'}, {time.monotonic() - one.started:.0f} s"
                    console.print(f"ablation {ended} of {total}: {one.name} {said}", highlight=False, markup=False)
        except BaseException:
            _end(running)
            raise
    return failed


def _start(config: Config, jobs: int, folder: Path) -> _Running:
    name = Path(config.run).name
    file = folder / "configs" / f"{name}.yaml"
    with disk_errors(folder, "free some space and give the command again"):
        write_text(file, dump(config))
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with open(folder / "logs" / f"{name}.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid()), "train", str(file)], stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, env={"OMP_NUM_THREADS": threads, **os.environ},
            start_new_session=True,  # Ctrl-C reaches them through `_end` alone: a second one would cut an update off
        )  # fmt: skip
    return _Running(name, process, time.monotonic())


def _end(running: Sequence[_Running]) -> None:
    """Interrupts what still runs, waits for its checkpoint, kills what does not end; a second signal kills at once."""
    try:
        for one in running:
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + PATIENCE
        for one in running:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.1, deadline - time.monotonic()))
    finally:
        for one in running:
            if one.process.poll() is None:
                one.process.kill()
                one.process.wait()


def main(parent: int, arguments: Sequence[str]) -> None:
    """The command with these arguments, interrupted when its parent ends."""
    die_with(parent, signal.SIGINT)
    sys.argv[1:] = arguments
    runpy.run_module("ilr_fast.cli", run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
