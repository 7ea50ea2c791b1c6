"""YAML as configs use it: floats as in YAML 1.2 (1e-6 needs no point), and no key twice.

    parse_yaml("{lr: 1e-6}", "an argument")     # {"lr": 1e-06}
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ilr_fast.errors import UserError

_FLOAT = re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$|^[-+]?(\d[\d_]*)?\.\d+([eE][-+]?\d+)?$")


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would read as floats."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: set = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`, whose keys those of its own replace
            continue
        name = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        place = f"{key_node.start_mark.name}, line {key_node.start_mark.line + 1}"
        if not isinstance(name, Hashable):
            raise UserError(f"{name!r} can't be a key", place, "write `key: value`, the key a single word")
        if name in seen:
            raise UserError(f"{name!r} stands there twice", place, "give each agent its own name, and each key once")
        seen.add(name)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def parse_yaml(text: str, where: str) -> Any:
    """A YAML text as plain values; UserError that names the place in `where`."""
    try:
        loader = _Loader(text)
        loader.name = where
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"not YAML: {problem}", place, "mend the line, or quote the value") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"not YAML: {error}", where, "quote the value") from None  # a date that does not exist


def read_yaml(path: Path) -> dict:
    """A YAML file as a dict, {} for an empty one; UserError where it can't be read or isn't a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", str(path), "check the path of the file") from None
    except UnicodeDecodeError:
        raise UserError("not a text file in UTF-8", str(path), "check the path of the file") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError("not a mapping of keys to values", str(path), "start from one of the files in configs/")
    return tree


def dump_yaml(tree: Any) -> str:
    """Plain values as YAML text, keys in order; `parse_yaml` gives the same back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
