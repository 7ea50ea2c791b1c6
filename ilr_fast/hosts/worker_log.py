"""A worker's log: what it and its libraries print goes to a file, without secrets; the last lines are kept for errors.

    log = WorkerLog(process.stderr, Path("runs/mine/logs/ada.log"))
    log.tail()        # once the process has ended: what it said last

The values of environment variables that are named like secrets are struck out before anything is written.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

LINES = 20
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_SHORTEST_SECRET = 6  # characters; `true` or `0` in such a variable is no secret


class WorkerLog:
    """Copies `pipe` to the end of the file `path` in a thread of its own, until the pipe ends."""

    def __init__(self, pipe: BinaryIO, path: Path):
        self.path = path
        self._last: deque[str] = deque(maxlen=LINES)
        self._secrets = secrets(os.environ)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._thread = threading.Thread(target=self._copy, args=[pipe], name=f"log of {path.stem}", daemon=True)
        self._thread.start()

    def tail(self, patience: float = 2.0) -> str:
        """The last lines; waits up to `patience` seconds for the pipe to end."""
        self._thread.join(patience)
        return "\n".join(self._last)

    def _copy(self, pipe: BinaryIO) -> None:
        full = False
        with open(self.path, "ab", buffering=0) as file, pipe:
            for line in pipe:
                for secret in self._secrets:
                    line = line.replace(secret, b"***")
                self._last.append(line.decode(errors="replace").rstrip())
                try:
                    if not full:
                        file.write(line)
                except OSError:  # a full disk: the pipe is still emptied, or the worker would wait for it
                    full = True


def secrets(environment: Mapping[str, str]) -> list[bytes]:
    """The values that must not be shown, the longest first."""
    found = {value for name, value in environment.items() if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET}
    return [value.encode() for value in sorted(found, key=len, reverse=True)]
