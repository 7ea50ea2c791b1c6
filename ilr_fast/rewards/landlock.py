"""Landlock: from here on this process reads the given paths and nothing else, and writes nothing. Linux 5.13.

Used where there are no mount namespaces to hide the rest of the file system.
(docs.kernel.org/userspace-api/landlock.html)
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from ilr_fast.rewards.syscalls import LANDLOCK_ADD, LANDLOCK_CREATE, LANDLOCK_RESTRICT, call

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
ASK_VERSION, PATH_BENEATH = 1, 1


def version() -> int:
    """The kernel's Landlock version, 0 where there is none."""
    try:
        return call(LANDLOCK_CREATE, None, 0, ASK_VERSION)
    except OSError:
        return 0


def restrict(readable: Iterable[str]) -> None:
    """Only `readable` and below can be read, only /dev/null written. Needs no_new_privs. Raises OSError."""
    known = version()
    rights = 13 + (known >= 2) + (known >= 3) + (known >= 5)  # how many kinds of file access the kernel knows
    fields = [(1 << rights) - 1] + [3] * (known >= 4) + [3] * (known >= 6)  # files; TCP; signals and abstract sockets
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = call(LANDLOCK_CREATE, attributes, len(attributes), 0)
    for path in readable:
        _allow(ruleset, path, READ_FILE | EXECUTE | (READ_DIR if os.path.isdir(path) else 0))
    _allow(ruleset, "/dev/null", READ_FILE | WRITE_FILE)
    call(LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor))
    call(LANDLOCK_ADD, ruleset, PATH_BENEATH, rule, 0)
    os.close(descriptor)
