"""Lines of JSON to and from a child process, with deadlines and a size limit that hold whatever the child does.

The child may be hostile: it may not read (a blocking write would hang), may not answer, or may answer without end.
Both directions are non-blocking and polled against one deadline (of `time.monotonic`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from typing import Any

LINE_LIMIT = 4 << 20  # bytes


class Closed(Exception):
    """The child ended, or broke the protocol, before it answered. `args[0]` says how."""


class Expired(Exception):
    """The deadline passed."""


class Channel:
    """The parent's end: `process` must have been started with pipes for stdin and stdout."""

    def __init__(self, process: subprocess.Popen[bytes]):
        assert process.stdin is not None and process.stdout is not None
        self.process, self._in, self._out = process, process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._pending = bytearray()

    def send(self, message: dict[str, Any], deadline: float) -> None:
        """Writes one message. Raises Closed or Expired."""
        self.send_line(json.dumps(message).encode() + b"\n", deadline)

    def receive(self, deadline: float) -> dict[str, Any]:
        """Reads one message of a child that is trusted to write JSON objects. Raises Closed or Expired."""
        return json.loads(self.receive_line(deadline))

    def send_line(self, line: bytes, deadline: float) -> None:
        """Writes one line, its newline included. Raises Closed or Expired."""
        view = memoryview(line)
        while view:
            self._wait(self._in, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._in, view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Closed("ended without reading") from error

    def receive_line(self, deadline: float) -> bytes:
        """Reads one line, its newline included. Raises Closed, also for a line above LINE_LIMIT, or Expired."""
        while (end := self._pending.find(b"\n")) < 0:
            if len(self._pending) > LINE_LIMIT:
                raise Closed("wrote more than the output limit")
            self._wait(self._out, select.POLLIN, deadline)
            try:
                read = os.read(self._out, 1 << 16)
            except BlockingIOError:
                continue
            if not read:
                raise Closed("ended without an answer")
            self._pending += read
        line = bytes(self._pending[: end + 1])
        del self._pending[: end + 1]
        return line

    def alive(self) -> bool:
        """Whether the child runs."""
        return self.process.poll() is None

    def close(self, patience: float = 0.0) -> None:
        """Hangs up, gives the child `patience` seconds to end by itself, then kills it. Never raises or hangs."""
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        if patience:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process in uninterruptible sleep is left to the kernel
            self.process.wait(5)

    @staticmethod
    def _wait(fd: int, event: int, deadline: float) -> None:
        left = deadline - time.monotonic()
        poll = select.poll()
        poll.register(fd, event)
        if left <= 0 or not poll.poll(max(1, left * 1000)):
            raise Expired
