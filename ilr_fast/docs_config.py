"""Writes docs/config.md from the config tree itself:

    python -m ilr_fast.docs_config > docs/config.md
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, Literal

from ilr_fast.config import Config
from ilr_fast.config_parse import bounds_text
from ilr_fast.runfolder import MAY_DIFFER

HEAD = """# Config reference

Written by `make docs` from the config tree (`ilr_fast/config.py`, `config_agent.py`); change it there.

A YAML file lists only what differs from the defaults. On the command line `key=value` follows the file, the key in full
or as much of its end as only one key has: `ilr-fast train configs/cpu/quickstart.yaml steps=4 loss.beta=0.01`. A
mistyped key, a wrong type, a value out of range and keys that contradict each other are refused before anything is
loaded.

A run goes on in its folder when the same command is given again. These keys may differ then: {may_differ}.
"""


def reference() -> str:
    """The whole page as Markdown."""
    may_differ = ", ".join(f"`{pattern}`" for pattern in MAY_DIFFER)
    return HEAD.format(may_differ=may_differ) + "".join(_section(Config, "")) + "\n"


def _section(cls: type, path: str) -> list[str]:
    """A heading, the keys that hold values as a table, then the sections below it."""
    hints = typing.get_type_hints(cls)
    rows, below = [], []
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            below += _section(kind, f"{path}{field.name}.")  # type: ignore[arg-type]
        elif typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1]):
            below += _section(typing.get_args(kind)[1], f"{path}{field.name}.<name>.")
        else:
            rows.append(_row(field, kind))
    title = f"`{path.rstrip('.')}`" if path else "Top level"
    text = f"\n## {title}\n\n{_summary(cls)}\n"
    table = ["", "| key | type | default | meaning |", "|---|---|---|---|", *rows]
    return [text, "\n".join(table) + "\n", *below]


def _row(field: dataclasses.Field, kind: Any) -> str:
    bounds = bounds_text(field.metadata["low"], field.metadata["high"])
    cells = (f"`{field.name}`", _kind(kind) + (f", {bounds}" if bounds else ""), f"`{_default(field)}`")
    return f"| {' | '.join(cells)} | {field.metadata['doc'].replace('|', chr(92) + '|')} |"


def _summary(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split())


def _default(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return json.dumps(value)


def _kind(kind: Any) -> str:
    """A type in words: `a whole number or null`, `own · final`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return f"{_kind(args[0])} or {'null' if args[1] is types.NoneType else _kind(args[1])}"
    if origin is Literal:
        return " · ".join(f"`{choice}`" for choice in args)
    if origin is list:
        return f"list of {_kind(args[0])}"
    if origin is dict:
        return "names with values" if args[1] is Any else f"{_kind(args[1])}, or one for each name"
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}[kind]


if __name__ == "__main__":
    print(reference(), end="")
