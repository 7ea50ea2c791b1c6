"""A worker process as seen from here: questions to it, answers from it, its log, and its end, which is never missed.

    crew: list[Link] = []
    link = Link("ada", "ilr_fast.hosts.worker", Path("runs/mine/logs/ada.log"), crew, hang_limit=900)
    link.ask("stats").result()

Threads read and write, so that answers arrive whatever the caller does. When a worker ends, every question that the
crew has open, and every later one, fails with `HostLost`: one agent alone is of no use, and nobody waits for a worker
that another one keeps from working. So it is where a worker hangs: where it owes an answer and gives no sign of
progress (pulse.py) for `hang_limit` seconds. The worker itself ends when this process does (worker.py).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ilr_fast.errors import UserError
from ilr_fast.hosts import HostLost, messages
from ilr_fast.hosts.sharing import hint
from ilr_fast.hosts.worker_log import WorkerLog

PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_LAST_SECONDS = 5.0  # a worker that has hung up may take so long to end


class Link:
    """Starts `python -m module PARENT_PID` and joins `crew`. Safe to use from several threads."""

    def __init__(
        self,
        name: str,
        module: str,
        log: Path,
        crew: list[Link],
        hang_limit: float | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.name, self._crew = name, crew
        self._pending: dict[int, Future[Any]] = {}
        self._ids = itertools.count(1)
        self._outbox: SimpleQueue[messages.Message | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._lost: HostLost | None = None
        self._words = ""  # the error that the worker named before it ended
        self._closed = False
        self._hang_limit, self._moves, self._at = hang_limit, 0, "its start"
        self._moved = time.monotonic()  # when something was asked or answered, or progress was last seen
        self._environment = environment or {}
        self._process = _spawn(module, self._environment)
        self._log = WorkerLog(self._process.stderr, log)  # type: ignore[arg-type]
        crew.append(self)
        for part in (self._listen, self._speak, *([self._watch] if hang_limit is not None else [])):
            threading.Thread(target=part, name=f"link of {name}", daemon=True).start()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def ask(self, call: str, **arguments: Any) -> Future[Any]:
        """Sends a question; the answer, or what it raised. HostLost, at once or in the future, where no one is there"""
        key, future = self.expect()
        self.post({"call": call, "id": key, "arguments": arguments})
        return future

    def expect(self) -> tuple[int, Future[Any]]:
        """An id to be answered, and the future of its answer."""
        with self._lock:
            if self._lost is not None:
                raise self._lost
            key, future = next(self._ids), Future[Any]()
            self._pending[key] = future
            self._moved = time.monotonic()
        return key, future

    def post(self, message: messages.Message) -> None:
        """Sends a message. Where the worker has ended, the listener says so to those who wait."""
        self._outbox.put(message)

    def close(self) -> None:
        """Ends the worker at once: what is to be kept is on the disk already. Open questions get no answer."""
        self._closed = True
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # in uninterruptible sleep: left to the kernel
            self._process.wait(_LAST_SECONDS)
        self._fail(HostLost(f"{self.name}: its process has been stopped"))
        self._log.tail()
        self._outbox.put(None)

    def _speak(self) -> None:
        """Writes in a thread of its own: a Ctrl-C, which the main thread gets, can't cut a message in two."""
        with contextlib.suppress(OSError), self._process.stdin as pipe:  # type: ignore[union-attr]
            while (message := self._outbox.get()) is not None:
                messages.write(pipe, message)  # type: ignore[arg-type]

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for message in messages.read(self._process.stdout):  # type: ignore[arg-type]
                self._words = message.get("failed", self._words)
                if message.get("pulse", self._moves) != self._moves:
                    self._moves, self._at, self._moved = message["pulse"], message["at"], time.monotonic()
                for key, value, error in message.get("answers", ()):
                    self._answer(key, value, error)
        if not self._closed:
            self._lose(self._cause())

    def _watch(self) -> None:
        """Ends a worker that hangs."""
        assert self._hang_limit is not None, "watched where there is a limit"
        looked = time.monotonic()
        while not self._closed and self._lost is None:
            time.sleep(1.0)
            before, looked = looked, time.monotonic()
            with self._lock:
                if looked - before > 3.0:  # this process stood still: what has come meanwhile is not read yet
                    self._moved = looked
                still = time.monotonic() - self._moved
                hangs = bool(self._pending) and still > self._hang_limit
            if hangs:
                self._words = f"no sign of progress for {still:.0f} s, last in {self._at} (hang_limit)"
                self._process.kill()
                self._lose(self._cause())  # here too: a process that the kernel can't end keeps its pipe open

    def _lose(self, lost: HostLost) -> None:
        for link in self._crew:
            link._fail(lost)

    def _answer(self, key: int, value: Any, error: Any) -> None:
        with self._lock:
            future = self._pending.pop(key)
            self._moved = time.monotonic()
        if not future.set_running_or_notify_cancel():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(self._hinted(messages.to_error(error)))

    def _hinted(self, error: Exception) -> Exception:
        told = hint(str(error), self._environment)
        return (
            UserError(error.what, error.where, f"{error.remedy}; {told}")
            if isinstance(error, UserError) and told
            else error
        )

    def _fail(self, lost: HostLost) -> None:
        with self._lock:
            self._lost = self._lost or lost
            pending, self._pending = self._pending, {}
        for future in pending.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(lost)

    def _cause(self) -> HostLost:
        """Why the worker ended, and the end of its log."""
        try:
            status = self._process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST_SECONDS)
            status = -signal.SIGKILL
        tail = self._log.tail()
        log = f"its log is {self._log.path}" + (f"; it ends:\n{tail}" if tail else "")
        told = hint(f"{self._words}\n{tail}", self._environment)
        more = f"\n  → {told}" if told else ""
        return HostLost(f"{self.name}: its process {_ended(status, self._words)}{more}\n  → {log}")


def _spawn(module: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A fresh interpreter in a session of its own: a Ctrl-C in the terminal reaches this process alone.

    The kernel ends the worker with the thread that called this (worker.py), so that thread must last.
    """
    path = [PACKAGE_ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return subprocess.Popen(
        [sys.executable, "-m", module, str(os.getpid())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip


def _ended(status: int, words: str) -> str:
    if words:
        return f"failed: {words}"
    if status >= 0:
        return f"ended by itself with exit status {status}"
    name = signal.Signals(-status).name
    hint = " (the kernel does so where memory runs out)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
