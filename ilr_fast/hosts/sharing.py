"""Several agents' processes on one GPU at the same time: NVIDIA's Multi-Process Service (MPS) while a run lasts.

A GPU is one process's at a time, a slice of some milliseconds each, unless they are clients of one MPS server: then
kernels of all run beside each other, and what one process leaves idle another one uses. The service is a daemon without
any rights or settings of its own; here it belongs to the run alone, on pipes in a folder of its own, and ends with it.

    with served(shared) as environment:      # {} where nothing is shared or the service is not to be had
        ProcessHost(…, environment)

    python -m ilr_fast.hosts.sharing DAEMON    # keeps the daemon until its standard input ends, by a kill too
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from ilr_fast.engines.pace import paced
from ilr_fast.parent import adopt

DAEMON = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_OWN_PIPES = Path("/tmp/nvidia-mps")  # where a daemon listens that is told nothing
_STARTS, _ENDS = 10.0, 3.0  # seconds that the daemon may take
_LONGEST = 107 - len("/control_privileged")  # bytes of a folder's path: a socket's has at most 107
_PREFIX = "ilr-fast-mps-"


@contextlib.contextmanager
def served(shared: bool, keep_step: bool = True) -> Iterator[dict[str, str]]:
    """What to add to the environment of processes that share a GPU, for as long as this is open.

    Empty where nothing is `shared` and where no daemon is to be had. Where one listens already, clients find it by
    themselves. With `keep_step` their engines do (engines/pace.py). A daemon that does not start costs a warning, and
    so does a folder of pipes that the user has named and at which nobody listens.
    """
    if not shared:
        yield {}
        return
    with contextlib.ExitStack() as stack:
        pace = stack.enter_context(paced()) if keep_step else {}
        if _is_client(os.environ):
            yield {**pace}
        elif daemon := shutil.which(DAEMON):
            said = stack.enter_context(_keeper(daemon))
            word, _, folder = said.partition(" ")
            if word != "listens":
                told = said or f"{DAEMON} did not start"
                warnings.warn(f"agents' processes take turns on the GPU: {told}", stacklevel=3)
            yield _environment(folder, os.environ) | pace if word == "listens" else {}
        else:
            yield {}


def hint(told: str, environment: Mapping[str, str]) -> str:
    """What to try where an error of a process with this environment may come from the server; else empty."""
    blamed = PIPES in environment and re.search(r"\bMPS\b|CUDA", told) and "out of memory" not in told
    return "`mps: never` goes without the MPS server that its process was a client of" if blamed else ""


def _is_client(environment: Mapping[str, str]) -> bool:
    """Whether new processes are some daemon's clients anyway."""
    named = environment.get(PIPES)
    found = listens(Path(named) if named else _OWN_PIPES)
    if named and not found:
        told = f"{PIPES}={named}: no daemon listens there; the run starts one of its own"
        warnings.warn(told, stacklevel=4)
    return found


def listens(folder: Path) -> bool:
    """Whether a daemon listens at its pipes: a socket that one has left behind refuses."""
    path = folder / "control"
    try:
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return True
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as knocking:
            knocking.settimeout(1.0)
            knocking.connect(str(path))
    except OSError as error:  # a socket of another kind is somebody's
        return error.errno == errno.EPROTOTYPE
    return True


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
def _keeper(daemon: str) -> Iterator[str]:
    """This module as a process, in a session of its own, so that a Ctrl-C does not reach it; what it says."""
    keeper = subprocess.Popen(
        [sys.executable, "-m", __name__, daemon],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    said = ""
    try:
        with keeper:  # its input ends, and it is waited for
            said = keeper.stdout.readline().strip()  # type: ignore[union-attr]
            yield said
    finally:
        word, _, folder = said.partition(" ")
        # After a KeyboardInterrupt Popen has waited for a quarter of a second only. Below 0: it was killed.
        if keeper.wait() < 0 and word == "listens":
            _quit(daemon, os.environ | _places(folder))
            shutil.rmtree(folder, ignore_errors=True)


def _keep(daemon: str) -> None:
    """Runs the daemon, says where it listens, and ends it and all that it has started with the standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    adopt()
    folder = _folder()
    environment, log = os.environ | _places(folder), Path(folder, "output.log")
    try:
        with open(log, "wb") as output:
            command = [daemon, "-f"]
            running = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            print(_started(running, folder) or " ".join(log.read_text(errors="replace").split())[-300:], flush=True)
            sys.stdin.read()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _quit(daemon, environment)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(_ENDS)
            _kill_children()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _folder() -> str:
    """A new folder for pipes, whose path is not too long."""
    place = tempfile.gettempdir()
    fits = len(os.fsencode(place)) + len(f"/{_PREFIX}") + 8 <= _LONGEST
    return tempfile.mkdtemp(prefix=_PREFIX, dir=place if fits else "/tmp")


def _started(running: subprocess.Popen[bytes], folder: str) -> str:
    """Waits for the daemon; empty where it does not listen in time."""
    end = time.monotonic() + _STARTS
    while running.poll() is None and time.monotonic() < end:
        if listens(Path(folder)):
            return f"listens {folder}"
        time.sleep(0.02)
    return ""


def _quit(daemon: str, environment: Mapping[str, str]) -> None:
    """Asks a daemon to end, with its servers; those whose clients are gone end at once."""
    told, quiet = f"quit -t {_ENDS:.0f}\n", subprocess.DEVNULL
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run([daemon], input=told, env=environment, text=True, stdout=quiet, stderr=quiet, timeout=2 * _ENDS)


def _kill_children() -> None:
    """Whatever the daemon has left: what a process that is killed had started becomes this one's child (Linux)."""
    end = time.monotonic() + _ENDS
    while (children := _children()) and time.monotonic() < end:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)


def _children() -> list[int]:
    """This process's children, by the kernel's list."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, parent, *_ = path.read_text().rpartition(")")[2].split()
            found += [int(path.parent.name)] if int(parent) == os.getpid() else []
    return found


if __name__ == "__main__":
    _keep(*sys.argv[1:])
