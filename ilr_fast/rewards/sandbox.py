"""Starts jails (jail.py) and finds out, before any work is done, which confinement this machine allows.

    sandbox = Sandbox()                        # UserError where there is none
    channel = sandbox.launch("ilr_fast.rewards.candidate", cpu_seconds=6)
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ilr_fast.errors import UserError
from ilr_fast.rewards.channel import Channel, Closed, Expired
from ilr_fast.rewards.pool import PACKAGE_ROOT, START_LIMIT, Broken

Mode = Literal["namespaces", "user"]
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")
START = "import sys; sys.path.append(sys.argv.pop(1)); from ilr_fast.rewards.jail import main; main()"
REMEDY = (
    "run as root, or let users make namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces>0, "
    "kernel.apparmor_restrict_unprivileged_userns=0; in Docker --security-opt seccomp=unconfined); Linux 5.13 or newer"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one jail: MiB of address space per process, processes and threads together, MiB of files in all."""

    memory_mib: int = 512
    processes: int = 4
    files_mib: int = 16


class Sandbox:
    """Starts jails in the strongest mode that works here; `mode` names one to insist on."""

    def __init__(self, limits: Limits | None = None, mode: Mode | None = None):
        self.limits = limits or Limits()
        reasons = []
        for candidate in (mode,) if mode else modes():
            self.mode: Mode = candidate
            reason = self._try()
            if reason is None:
                return
            reasons.append(f"{candidate}: {reason}")
        raise UserError(f"code cannot be confined on this machine ({'; '.join(reasons)})", "reward.name: code", REMEDY)

    def launch(self, entry: str, cpu_seconds: int | None) -> Channel:
        """Starts a jail that runs `entry`.serve; its first message is {"ready": true}, or false with the reason."""
        settings: dict[str, Any] = {
            "entry": entry, "mode": self.mode, "parent": os.getpid(), "cpu_seconds": cpu_seconds,
            "uid": unused_user() if os.getuid() == 0 else None, "readable": readable_paths(),
            "memory_mib": self.limits.memory_mib, "processes": self.limits.processes,
            "files_mib": self.limits.files_mib,
        }  # fmt: skip
        # the interpreter under a virtual environment, without its packages: faster, and less for the program to see
        command = [getattr(sys, "_base_executable", sys.executable), "-S", "-s", "-P", "-B", "-c", START]
        return Channel(
            subprocess.Popen(
                [*command, PACKAGE_ROOT, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}, cwd="/",
                start_new_session=True,
            )
        )

    def ready(self, channel: Channel) -> None:
        """Waits for a launched jail. Raises Broken where it could not confine itself."""
        try:
            greeting = channel.receive(time.monotonic() + START_LIMIT)
        except (Closed, Expired, ValueError) as error:
            raise Broken(f"the jail did not start: {type(error).__name__} {error}") from error
        if not greeting.get("ready"):
            raise Broken(str(greeting.get("error")))

    def _try(self) -> str | None:
        """Runs a program of one line; None where that worked, else why not."""
        channel = self.launch("ilr_fast.rewards.candidate", cpu_seconds=10)
        try:
            self.ready(channel)
            deadline = time.monotonic() + START_LIMIT
            channel.send({"op": "run", "code": "answer = 6 * 7", "after": ""}, deadline)
            channel.receive(deadline)
            channel.send({"op": "eval", "source": "answer", "names": {}}, deadline)
            reply = channel.receive(deadline)
            return None if reply == {"value": 42} else f"a first program answered {reply}"
        except (Broken, Closed, Expired) as error:
            return str(error) or type(error).__name__
        finally:
            channel.close(patience=2)


def modes() -> tuple[Mode, ...]:
    """The modes that this user may have, the strongest first."""
    return ("namespaces", "user") if os.getuid() == 0 else ("namespaces",)


def readable_paths() -> list[str]:
    """What a jail can read: the system's programs and libraries and the interpreter. None lies within another."""
    wanted = [p for p in (*SYSTEM, sys.base_prefix, sys.base_exec_prefix) if os.path.lexists(p)]
    chosen: list[str] = []
    for path in sorted({os.path.abspath(p) for p in wanted}, key=len):
        if not any(Path(path).is_relative_to(other) for other in chosen):
            chosen.append(path)
    return chosen


def unused_user() -> int:
    """A user id without an account and without processes, drawn at random: each jail of root's has its own."""
    running = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                running.add(os.stat(f"/proc/{name}").st_uid)
    taken = {entry.pw_uid for entry in pwd.getpwall()} | running
    while (uid := random.SystemRandom().randrange(20_000, 60_000)) in taken:
        continue
    return uid
