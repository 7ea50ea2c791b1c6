"""Inside the jail: runs the program under test and evaluates expressions for the checker.

It is in the program's own process and so in the program's hands: whatever it answers counts as the program's answer,
never as a verdict. It is never told what a test expects. Requests, a line of JSON each:

    {"op": "run", "code": …, "after": …}       the program, then the tests' set-up
    {"op": "eval", "source": …, "names": …}    an expression, with values for some names
    {"op": "call", "ref": 3, "args": …, "kwargs": …}

Answers: {"value": …} as values.py has it, or {"raise": type, "text": …}.
"""

from __future__ import annotations

import json
import sys
import types
from typing import Any, BinaryIO

from ilr_fast.rewards.values import decode, encode


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers until the requests end."""
    module = types.ModuleType("program")  # not __main__: `if __name__ == "__main__":` parts are demonstrations
    sys.modules["program"] = module  # dataclasses and typing look their module up
    kept: list[Any] = []

    def keep(item: Any) -> int:
        kept.append(item)
        return len(kept) - 1

    for line in requests:
        try:
            value = _answer(json.loads(line), module.__dict__, kept)
            text = json.dumps({"value": encode(value, keep)})
        except BaseException as error:  # SystemExit and all: the program's
            text = json.dumps({"raise": type(error).__name__, "text": _shown(error)})
        answers.write(text.encode() + b"\n")
        answers.flush()


def _answer(request: dict[str, Any], namespace: dict[str, Any], kept: list[Any]) -> Any:
    if request["op"] == "run":
        exec(compile(request["code"], "program", "exec"), namespace)
        exec(compile(request["after"], "setup", "exec"), namespace)
        return None
    if request["op"] == "eval":
        names = {name: decode(value, kept.__getitem__) for name, value in request["names"].items()}
        return eval(request["source"], {**namespace, **names})
    arguments = [decode(value, kept.__getitem__) for value in request["args"]]
    return kept[request["ref"]](*arguments, **{k: decode(v, kept.__getitem__) for k, v in request["kwargs"].items()})


def _shown(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:  # the program's own __str__
        return ""
