"""YAML and `key=value` overrides → Config, with an error that names the key's path and the nearest known key.

An override's key is a full path (`loss.beta=0.1`) or its last part where only one key has it (`beta=0.1`):

    config = load_config("configs/cpu/quickstart.yaml", ["steps=4", "agents.gemma.optimizer.lr=1e-6"])
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from ilr_fast.config import Config, check
from ilr_fast.errors import UserError, nearest


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a float (1e-6 without a point), and no key twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$|^[-+]?(\d[\d_]*)?\.\d+([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen: set = set()
    for key_node, _ in node.value:
        name = loader.construct_object(key_node, deep=True)
        if name in seen:
            line = key_node.start_mark.line + 1
            raise UserError(f"{name!r} stands there twice", f"{key_node.start_mark.name}, line {line}",
                            "give each agent its own name, and each key once")
        seen.add(name)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def read_yaml(path: Path) -> dict:
    """A YAML file as a dict; UserError for a file that can't be read or isn't a mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.load(file, _Loader) or {}
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", str(path), "check the path of the config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise UserError(f"not YAML: {getattr(error, 'problem', None) or error}", place, "mend the line") from None
    if not isinstance(tree, dict):
        raise UserError("not a mapping of keys to values", str(path), "start from one of the files in configs/")
    return tree


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, overrides, builds and checks a config. Raises UserError for every mistake."""
    tree = read_yaml(Path(path))
    for override in overrides:
        _override(tree, override)
    config = build(Config, tree, "", str(path))
    check(config, str(path))
    return config


def _override(tree: dict, text: str) -> None:
    name, separator, value = text.partition("=")
    if not separator:
        raise UserError("not key=value", f"argument {text!r}", "write for example steps=20")
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise UserError(f"{value!r} is not a YAML value", f"argument {text!r}", "quote it") from None
    parts = _full_path(name, tree).split(".")
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"{part!r} has no keys below it", f"argument {text!r}", "check the path of the key")
    node[parts[-1]] = parsed


def _full_path(name: str, tree: dict) -> str:
    """A key's full path, from its last part where that is unique."""
    if "." in name or name in {f.name for f in dataclasses.fields(Config)}:
        return name
    paths = [p for p, _, _ in walk(Config) if p.rsplit(".", 1)[-1] == name and "<name>" not in p]
    agent_paths = [p for p, _, _ in walk(Config) if p.rsplit(".", 1)[-1] == name and "<name>" in p]
    agents = tree.get("agents") or {}
    paths += [p.replace("<name>", agent) for p in agent_paths for agent in agents]
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise UserError(f"{name!r} is the name of several keys", f"argument {name}=…", f"write one of: {', '.join(paths)}")
    known = {p.rsplit(".", 1)[-1] for p, _, _ in walk(Config)}
    raise UserError(f"unknown key {name!r}", f"argument {name}=…", nearest(name, known))


def walk(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every leaf key of the tree: (path, field, type); the agents' keys stand under `agents.<name>`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, path = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            yield from walk(kind, f"{path}.")  # type: ignore[arg-type]
        elif typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1]):
            yield from walk(typing.get_args(kind)[1], f"{path}.<name>.")
        else:
            yield path, field, kind


def build(cls: type, tree: Any, path: str, where: str) -> Any:
    """A dataclass of the tree from parsed YAML; `path` is the key's path so far, `where` the file."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"expected keys below it, got {tree!r}", f"{where}: {path.rstrip('.')}", "see docs/config.md")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in tree:
        if name not in fields:
            raise UserError(f"unknown key {name!r}", f"{where}: {path}{name}", nearest(str(name), fields))
    values = {}
    for name, value in tree.items():
        values[name] = _convert(value, hints[name], f"{path}{name}", where)
        _bounds(values[name], fields[name], f"{path}{name}", where)
    return cls(**values)


def _bounds(value: Any, field: dataclasses.Field, path: str, where: str) -> None:
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if value != value or (low is not None and value < low) or (high is not None and value > high):
        allowed = f"{low:g} to {high:g}" if low is not None and high is not None else (
            f"at least {low:g}" if low is not None else f"at most {high:g}")
        raise UserError(f"{value} is out of range", f"{where}: {path}", f"use {allowed}")


def _convert(value: Any, kind: Any, path: str, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, f"{path}.", where)  # type: ignore[arg-type]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), path, where)
    if origin is Literal:
        if isinstance(value, bool) and str(value).lower() not in args:
            value = {True: "on", False: "none"}.get(value)  # YAML 1.1 reads a bare `off` or `no` as false
        if value not in args:
            raise UserError(f"{value!r} is not one of its values", f"{where}: {path}", nearest(str(value), args))
        return value
    if origin is list and isinstance(value, list):
        return [_convert(v, args[0], f"{path}[{i}]", where) for i, v in enumerate(value)]
    if origin is dict:
        return _convert_dict(value, args[1], path, where)
    return _convert_scalar(value, kind, path, where)


def _convert_dict(value: Any, kind: Any, path: str, where: str) -> dict:
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return {"default": value}
    if not isinstance(value, dict):
        raise UserError(f"expected names with values, got {value!r}", f"{where}: {path}", "see docs/config.md")
    if kind is Any:
        return dict(value)
    return {str(k): _convert(v, kind, f"{path}.{k}", where) for k, v in value.items()}


def _convert_scalar(value: Any, kind: Any, path: str, where: str) -> Any:
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is kind:
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    expected = names.get(kind, "a list")
    raise UserError(f"expected {expected}, got {value!r}", f"{where}: {path}", f"write {expected}")


def to_tree(config: Any) -> Any:
    """The config as plain YAML types, every key as resolved."""
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """The whole config as YAML text; loading it gives the same config."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)
