"""Values between the program under test and its checker: JSON that can only become plain built-in values.

What arrives is from a process that may be hostile, so nothing is unpickled or evaluated and every object is built
here, from types whose comparison cannot be forged. None, bool, str, float, small int and list stand for themselves;
the rest is {"t": type, "v": content}. Subclasses (named tuples, Counter, enums of int) arrive as their built-in base,
iterators as an iterator over their items; any other object as {"t": "ref", "v": number}, which only its own process
can follow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, ItemsView, KeysView, ValuesView
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

MOST_ITEMS = 100_000  # taken from an iterator


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """`value` as JSON data; `refer` numbers the objects that stay where they are. May raise what the value raises."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 1000 else {"t": "int", "v": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [encode(item, refer) for item in value]
    for kind in (tuple, set, frozenset, deque):
        if isinstance(value, kind):
            return {"t": kind.__name__, "v": [encode(item, refer) for item in value]}
    if isinstance(value, dict):
        return {"t": "dict", "v": [[encode(k, refer), encode(v, refer)] for k, v in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"t": type(value).__name__, "v": value.hex()}
    if isinstance(value, complex):
        return {"t": "complex", "v": [value.real, value.imag]}
    if isinstance(value, range):
        return {"t": "range", "v": [value.start, value.stop, value.step]}
    if isinstance(value, (Decimal, Fraction)):
        return {"t": type(value).__name__, "v": str(value)}
    if hasattr(type(value), "__next__") or isinstance(value, (KeysView, ValuesView, ItemsView)):
        return {"t": "iter", "v": [encode(item, refer) for item in islice(value, MOST_ITEMS)]}
    return {"t": "ref", "v": refer(value)}


def decode(data: Any, follow: Callable[[int], Any]) -> Any:
    """The value of JSON data made by `encode`; `follow` gives what a reference stands for. Raises on anything else."""
    if isinstance(data, list):
        return [decode(item, follow) for item in data]
    if not isinstance(data, dict):
        return data
    kind, content = data["t"], data["v"]
    if kind in SEQUENCES:
        return SEQUENCES[kind](decode(item, follow) for item in content)
    if kind == "dict":
        return {decode(k, follow): decode(v, follow) for k, v in content}
    if kind == "iter":
        return iter([decode(item, follow) for item in content])
    return follow(content) if kind == "ref" else ATOMS[kind](content)


SEQUENCES: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
ATOMS: dict[str, Callable[[Any], Any]] = {
    "int": lambda v: int(v, 16), "bytes": bytes.fromhex, "bytearray": bytearray.fromhex,
    "complex": lambda v: complex(*v), "range": lambda v: range(*v), "Decimal": Decimal, "Fraction": Fraction,
}  # fmt: skip
