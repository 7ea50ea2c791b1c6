"""The user's mistakes: one message that says what is wrong, where, and what to do about it.

Raised before models are loaded wherever that is possible; the command line prints it and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: `what` is wrong, `where` it stands (file, key or argument), the `remedy`."""

    def __init__(self, what: str, where: str, remedy: str):
        super().__init__(f"{where}: {what}\n  → {remedy}")
        self.what, self.where, self.remedy = what, where, remedy


class RunError(RuntimeError):
    """A run that cannot go on (too many failures): what has been computed is saved; exit status 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: the nearest known ones, or the list of all where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6) or [k for k in known if name and k.startswith(name)]
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else f"known: {', '.join(known)}"
