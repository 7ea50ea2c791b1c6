"""Several agents' processes on one GPU at the same time: NVIDIA's Multi-Process Service (MPS) while a run lasts.

A GPU is one process's at a time, a slice of some milliseconds each, unless they are clients of one MPS server: then
kernels of all run beside each other, and what one process leaves idle another one uses. The service is a daemon without
any rights or settings of its own; here it belongs to the run alone, on pipes in a folder of its own, and ends with it.

    with served(shared) as environment:      # {} where nothing is shared or the service is not to be had
        ProcessHost(…, environment)

    python -m ilr_fast.hosts.sharing DAEMON FOLDER    # keeps the daemon until its standard input ends, by a kill too
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

DAEMON = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_OWN_PIPES = Path("/tmp/nvidia-mps/control")  # where a daemon listens that is told nothing
_STARTS, _ENDS = 10.0, 3.0  # seconds that the daemon may take


@contextlib.contextmanager
def served(shared: bool) -> Iterator[dict[str, str]]:
    """What to add to the environment of processes that share a GPU, for as long as this is open.

    Empty where nothing is `shared`, where the daemon is not installed, and where one listens already: clients find it
    by themselves. A daemon that does not start costs a warning.
    """
    daemon = shutil.which(DAEMON) if shared and not _listens(os.environ) else None
    if daemon is None:
        yield {}
        return
    # a server may still write its log when the folder goes
    temporary = TemporaryDirectory(prefix="ilr-fast-mps-", ignore_cleanup_errors=True)
    with temporary as folder, contextlib.ExitStack() as stack:
        keeper = stack.enter_context(_keeper(daemon, folder))
        said = keeper.stdout.readline().strip()  # type: ignore[union-attr]
        if said != "listens":
            warnings.warn(f"agents' processes take turns on the GPU: {said or DAEMON + ' did not start'}", stacklevel=3)
        yield _environment(folder, os.environ) if said == "listens" else {}


def _listens(environment: Mapping[str, str]) -> bool:
    """Whether new processes are some daemon's clients anyway."""
    return PIPES in environment or _OWN_PIPES.exists()


def _environment(folder: str, outside: Mapping[str, str]) -> dict[str, str]:
    """A daemon's clients count the devices that it sees, from 0; by their names they are the same."""
    found = _places(folder)
    seen = [name for name in outside.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if seen and all(name.strip().isdigit() for name in seen):
        found["CUDA_VISIBLE_DEVICES"] = ",".join(str(n) for n in range(len(seen)))
    return found


def _places(folder: str) -> dict[str, str]:
    return {PIPES: folder, LOGS: folder}


@contextlib.contextmanager
def _keeper(daemon: str, folder: str) -> Iterator[subprocess.Popen[str]]:
    """This module as a process, in a session of its own, so that a Ctrl-C does not reach it."""
    keeper = subprocess.Popen(
        [sys.executable, "-m", __name__, daemon, folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    try:
        yield keeper
    finally:
        keeper.stdin.close()  # type: ignore[union-attr]
        keeper.wait()
        keeper.stdout.close()  # type: ignore[union-attr]


def _keep(daemon: str, folder: str) -> None:
    """Runs the daemon, says whether it listens, and ends it with the standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    environment = os.environ | _places(folder)
    with open(Path(folder, "output.log"), "w+", encoding="utf-8") as log:
        running = subprocess.Popen([daemon, "-f"], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + _STARTS
        while not Path(folder, "control").exists() and running.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if Path(folder, "control").exists() and running.poll() is None:
            print("listens", flush=True)
        else:
            log.seek(0)
            print(" ".join(log.read().split())[-300:], flush=True)
        sys.stdin.read()
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):  # servers whose clients are gone end at once
            told = f"quit -t {_ENDS:.0f}\n"
            subprocess.run([daemon], input=told, env=environment, text=True, stdout=log, stderr=log, timeout=2 * _ENDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(_ENDS)
        running.kill()
        running.wait()


if __name__ == "__main__":
    _keep(*sys.argv[1:])
