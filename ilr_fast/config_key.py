"""A key of the config: a dataclass field with its documentation and bounds.

    lr: float = key(1e-6, "Peak learning rate.", low=0)
"""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(default: Any, doc: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A config field: default, one sentence of documentation, inclusive bounds."""
    metadata = {"doc": doc, "low": low, "high": high}
    if isinstance(default, (dict, list)) or callable(default):
        return field(default_factory=default if callable(default) else default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
