"""A few verifier processes that are reused, killed when they overrun and started again.

A verifier is a process of its own because nothing else stops one: sympy in `10^{10^{10}}` holds the interpreter in C
code, deaf to signals and to other threads. Processes start when first needed, run in their own session (a Ctrl-C in
the terminal does not reach them), and die with this one: it kills them at exit, and the kernel does if it is itself
killed (worker.py).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ilr_fast.rewards.channel import Channel, Closed

START_LIMIT = 120.0  # seconds until a verifier must be ready: imports on a busy machine
PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class Broken(Exception):
    """The verifier failed, twice in a row or on its own: not the text's fault as far as can be known."""


class Pool:
    """At most `size` processes made by `spawn`, each lent to one caller at a time. Safe to use from several threads."""

    def __init__(self, spawn: Callable[[], Channel], size: int):
        self._spawn, self._slots, self._lock = spawn, threading.Semaphore(size), threading.Lock()
        self._idle: list[Channel] = []
        self._all: set[Channel] = set()
        # The kernel ties "die with the parent" to the thread that started the child, so one that lasts starts them all.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="verifier-starter")
        self._finalizer = weakref.finalize(self, _close_all, self._all, os.getpid())

    @contextlib.contextmanager
    def lend(self) -> Iterator[Channel]:
        """A process that is ready. One whose use ended in any exception is killed: it may be out of step."""
        with self._slots:
            channel = self._take()
            try:
                yield channel
            except BaseException:
                self._drop(channel)
                raise
            with self._lock:
                self._idle.append(channel)

    def ask(self, request: dict[str, Any], time_limit: float) -> dict[str, Any]:
        """One request, one answer. Raises Expired past `time_limit` seconds, Broken where the verifier fails.

        A request whose process ended without an answer is tried once more: something outside may have killed it.
        """
        for attempt in (1, 2):
            try:
                with self.lend() as channel:
                    deadline = time.monotonic() + time_limit
                    channel.send(request, deadline)
                    return channel.receive(deadline)
            except Closed as error:
                if attempt == 2:
                    raise Broken(f"the verifier {error.args[0]}") from error
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Kills the processes. A later request would start new ones."""
        with self._lock:
            self._idle.clear()
            _close_all(self._all, os.getpid())

    def _take(self) -> Channel:
        while True:
            with self._lock:
                channel = self._idle.pop() if self._idle else None
            if channel is None:
                return self._start()
            if channel.alive():
                return channel
            self._drop(channel)

    def _start(self) -> Channel:
        channel = self._starter.submit(self._spawn).result()
        self._all.add(channel)
        try:
            greeting = channel.receive(time.monotonic() + START_LIMIT)
        except BaseException as error:
            self._drop(channel)
            if isinstance(error, Exception):
                raise Broken(f"the verifier did not start: {error}") from error
            raise
        if not greeting.get("ready"):
            self._drop(channel)
            raise Broken(f"the verifier did not start: {greeting.get('error')}")
        return channel

    def _drop(self, channel: Channel) -> None:
        self._all.discard(channel)
        channel.close()


def _close_all(channels: set[Channel], owner: int) -> None:
    if os.getpid() != owner:  # a forked copy of this process must not end what is not its own
        return
    while channels:
        channels.pop().close()


def spawn_worker(function: str, memory_mib: int) -> Channel:
    """Starts worker.py for `module:function`, with a fixed hash seed, and does not wait for it."""
    path = [PACKAGE_ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ilr_fast.rewards.worker", function, str(os.getpid()), str(memory_mib)]
    return Channel(
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )
    )
