"""A verifier process: reads requests as lines of JSON, answers each by one function.

    python -m ilr_fast.rewards.worker ilr_fast.rewards.math:verify PARENT_PID MEMORY_MIB

It imports the function's module and what that needs, never torch; its memory is limited; the kernel kills it when the
thread that started it ends. What the libraries print goes nowhere: the answers have the standard output to
themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from ilr_fast.parent import die_with


def main(function: str, parent: int, memory_mib: int) -> None:
    """Serves until the requests end."""
    requests, answers = private_pipes()
    die_with(parent)
    try:
        module, _, name = function.partition(":")
        verify = getattr(importlib.import_module(module), name)
        verify(None)  # imports, so that the first request is not charged for them
    except Exception as error:  # a package is missing or broken: the parent tells the user
        _write(answers, {"ready": False, "error": f"{type(error).__name__}: {error}"})
        return
    limit = memory_mib << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    serve(requests, answers, verify)


def serve(requests: BinaryIO, answers: BinaryIO, verify: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers one request after another; what `verify` raises becomes {"broken": …}, a limit {"limit": …}."""
    _write(answers, {"ready": True})
    for line in requests:
        try:
            answer = verify(json.loads(line))
        except (MemoryError, RecursionError) as error:
            answer = {"limit": type(error).__name__}
        except Exception as error:  # the library's bug, for the parent to count
            answer = {"broken": f"{type(error).__name__}: {error}"[:500]}
        _write(answers, answer)


def private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The standard input and output as private files; descriptors 0, 1 and 2 become /dev/null."""
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    return os.fdopen(requests, "rb"), os.fdopen(answers, "wb")


def _write(answers: BinaryIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the parent hung up
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
