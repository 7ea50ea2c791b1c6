"""YAML and `key=value` overrides → Config, with an error that names the key's path and the nearest known key.

An override's key is a full path (`loss.beta=0.1`) or as much of its end as only one key has (`beta=0.1`):

    config = load_config("configs/cpu/quickstart.yaml", ["steps=4", "agents.gemma.optimizer.lr=1e-6"])
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ilr_fast.config import Config
from ilr_fast.config_check import check
from ilr_fast.config_yaml import dump_yaml, parse_yaml, read_yaml
from ilr_fast.errors import UserError, nearest

__all__ = ["build", "dump", "load_config", "read_yaml", "to_tree", "walk", "walk_values"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, overrides, builds and checks a config. Raises UserError for every mistake."""
    tree = read_yaml(Path(path))
    for override in overrides:
        _override(tree, override)
    config = build(Config, tree, "", str(path))
    check(config, str(path))
    return config


def to_tree(config: Any) -> Any:
    """The config as plain YAML types, every key as resolved."""
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """The whole config as YAML text; loading it gives the same config."""
    return dump_yaml(to_tree(config))


def walk(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every leaf key of the tree: (path, field, type); the agents' keys stand under `agents.<name>`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, path = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            yield from walk(kind, f"{path}.")  # type: ignore[arg-type]
        elif (section := _values_of(kind)) is not None and dataclasses.is_dataclass(section):
            yield from walk(section, f"{path}.<name>.")  # type: ignore[arg-type]
        else:
            yield path, field, kind


def walk_values(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of `to_tree`'s: (path, value)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from walk_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def build(cls: type, tree: Any, path: str, where: str) -> Any:
    """A dataclass of the tree from parsed YAML; `path` is the key's path so far, `where` the file."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"expected keys below it, got {tree!r}", f"{where}: {path.rstrip('.')}", "see docs/config.md")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for name, value in tree.items():
        if name not in fields:
            raise UserError(f"unknown key {name!r}", f"{where}: {path}{name}", nearest(str(name), fields))
        values[name] = _convert(value, hints[name], f"{path}{name}", where)
        _bounds(values[name], fields[name], f"{path}{name}", where)
    return cls(**values)


def _override(tree: dict, text: str) -> None:
    """Puts one `key=value` into the tree; its mistakes name the argument, not the file."""
    where = f"argument {text!r}"
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UserError("not key=value", where, "write for example steps=20")
    parsed = parse_yaml(value, where)
    parts = _parts(_full_path(name, tree, where), tree)
    _check_override(parts, parsed, where)
    node = tree
    for part in parts[:-1]:
        below = {} if node.get(part) is None else node[part]
        if part == "max_tokens" and isinstance(below, int):
            below = {"default": below}  # `max_tokens: 8` is short for it
        if not isinstance(below, dict):
            raise UserError(f"the file has {below!r} for {part}, not keys", where, "mend the file")
        node[part] = node = dict(below)  # an alias (`engine: *engine`) stays what it is for the others
    node[parts[-1]] = parsed


def _check_override(parts: Sequence[str], value: Any, where: str) -> None:
    """Follows a path down the tree of types and converts the value, for the errors alone."""
    kind: Any = Config
    field = None
    for i, part in enumerate(parts):
        field = None
        if dataclasses.is_dataclass(kind):
            fields = {f.name: f for f in dataclasses.fields(kind)}
            if part not in fields:
                raise UserError(f"unknown key {'.'.join(parts[: i + 1])!r}", where, nearest(part, fields))
            kind, field = typing.get_type_hints(kind)[part], fields[part]
        elif (below := _values_of(kind)) is not None:
            kind = below
        elif kind is not Any:
            raise UserError(f"{'.'.join(parts[:i])!r} has no keys below it", where, "check the path of the key")
    path = ".".join(parts)
    converted = _convert(value, kind, path, where)
    if field is not None:
        _bounds(converted, field, path, where)


def _full_path(name: str, tree: dict, where: str) -> str:
    """A key's full path, from as much of its end as only one key has."""
    if name.split(".")[0] in {field.name for field in dataclasses.fields(Config)}:
        return name
    agents = tree.get("agents")
    names = list(agents) if isinstance(agents, dict) else []
    known = [path for path, _, _ in walk(Config)]
    paths = [
        path.replace("<name>", str(agent))
        for path in known
        if path.endswith(f".{name}")
        for agent in (names if "<name>" in path else [""])
    ]
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise UserError(f"{name!r} is the name of several keys", where, f"write one of: {', '.join(paths)}")
    candidates = known if "." in name else {path.rsplit(".", 1)[-1] for path in known}
    near = difflib.get_close_matches(name, candidates, n=2, cutoff=0.6)
    raise UserError(f"unknown key {name!r}", where, nearest(name, near) if near else "docs/config.md lists all keys")


def _parts(path: str, tree: dict) -> list[str]:
    """A path cut at its points, except those in an agent's name."""
    agents = tree.get("agents")
    for agent in sorted(map(str, agents), key=len, reverse=True) if isinstance(agents, dict) else ():
        if path.startswith(f"agents.{agent}."):
            return ["agents", agent, *path[len(f"agents.{agent}.") :].split(".")]
    return path.split(".")


def _values_of(kind: Any) -> Any:
    """The type of a dict's values, None for a type that is no dict."""
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None


def _bounds(value: Any, field: dataclasses.Field, path: str, where: str) -> None:
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise UserError(f"{value} is not a finite number", f"{where}: {path}", "give a number")
    if (low is not None and value < low) or (high is not None and value > high):
        raise UserError(f"{value} is out of range", f"{where}: {path}", f"use {bounds_text(low, high)}")


def bounds_text(low: float | None, high: float | None) -> str:
    """`0 to 1`, `at least 1`, `at most 9`; empty without bounds."""
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    if low is not None:
        return f"at least {low:g}"
    return "" if high is None else f"at most {high:g}"


def _convert(value: Any, kind: Any, path: str, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, f"{path}.", where)  # type: ignore[arg-type]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        words = [word for arg in args for word in typing.get_args(arg)]  # `auto` beside a number
        if (value is None and types.NoneType in args) or (isinstance(value, str) and value in words):
            return value
        return _convert(value, args[0], path, where)
    if origin is Literal:
        return _convert_choice(value, args, path, where)
    if origin is list and isinstance(value, list):
        return [_convert(v, args[0], f"{path}[{i}]", where) for i, v in enumerate(value)]
    if origin is dict:
        return _convert_dict(value, args[1], path, where)
    return _convert_scalar(value, kind, path, where)


def _convert_choice(value: Any, choices: Sequence[str], path: str, where: str) -> str:
    if isinstance(value, bool):  # YAML reads a bare `off` or `no` as false, `on` or `yes` as true
        value = next((word for word in (("on",) if value else ("off", "none")) if word in choices), value)
    if value not in choices:
        raise UserError(f"{value!r} is not one of its values", f"{where}: {path}", nearest(str(value), choices))
    return value


def _convert_dict(value: Any, kind: Any, path: str, where: str) -> dict:
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return {"default": value}
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"expected names with values, got {value!r}", f"{where}: {path}", "see docs/config.md")
    if kind is Any:
        return dict(value)
    if len({str(name) for name in value}) < len(value):
        raise UserError("a name stands there twice", f"{where}: {path}", "give each its own name")
    return {str(name): _convert(below, kind, f"{path}.{name}", where) for name, below in value.items()}


def _convert_scalar(value: Any, kind: Any, path: str, where: str) -> Any:
    if kind is Any or type(value) is kind:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    expected = names.get(kind, "a list")
    raise UserError(f"expected {expected}, got {value!r}", f"{where}: {path}", f"write {expected}")
