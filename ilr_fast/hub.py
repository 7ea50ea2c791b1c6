"""Rows of a data set on the Hugging Face Hub, through the optional package `datasets`.

    hub_rows("openai/gsm8k:main", "test", where="data.test")        name[:config], split
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from ilr_fast.errors import UserError
from ilr_fast.rows import Row

_REMEDY = "check the name and the network, or download the rows and give a JSONL path"


def hub_rows(name: str, split: str, where: str) -> Iterator[tuple[str, Row]]:
    """The rows of a split of `name[:config]`, each with where it stands. UserError, naming `where`, if it fails."""
    repository, _, config = name.partition(":")
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise UserError(f"reading {name} from the Hub needs the package datasets", where,
                        "pip install 'ilr-fast[hub]', or give a JSONL path") from None  # fmt: skip
    try:
        rows = library.load_dataset(repository, config or None, split=split)
    except Exception as error:  # network, names, splits and formats: the library raises a type of its own for each
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} (split {split}) can't be loaded from the Hub: {reason}", where, _REMEDY) from error
    return ((f"{name} {split} row {number}", row) for number, row in enumerate(rows))
