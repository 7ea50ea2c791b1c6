"""Rankings on disk, one file for each (model, data, prompts, W, R, seed), one line a window.

    cache = RankingCache.open(Path("cache"), {"model": "…", "data": data_fingerprint(questions), "window": 5, …})

Lines are appended as windows are ranked, so that a run that was cut off asks only for the rest; the line it was in the
middle of is dropped. Every line carries a checksum: a file damaged otherwise is refused with its name, as is one of
another key.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ilr_fast.errors import UserError
from ilr_fast.types import Question


def data_fingerprint(questions: Sequence[Question]) -> str:
    """A hash of the questions' ids and texts, in their order."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.id, question.text]).encode())
    return digest.hexdigest()


class RankingCache:
    """The rankings under one key. Use `open`."""

    def __init__(self, path: Path, key: Mapping[str, Any]):
        self.path, self.key = path, dict(key)

    @classmethod
    def open(cls, folder: Path, key: Mapping[str, Any]) -> RankingCache:
        """The cache file of `key` (plain JSON values: model and data fingerprints, window, repeats, seed) in `folder`.

        It is made where it is missing, whole or not at all. UserError where the folder can't be written.
        """
        name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:24]
        cache = cls(folder / f"ranking-{name}.jsonl", key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not cache.path.exists():
                made = cache.path.with_suffix(f".{os.getpid()}.tmp")
                made.write_bytes(_line({"key": cache.key}))
                os.replace(made, cache.path)
        except OSError as error:
            raise UserError(f"can't be written ({error.strerror})", str(cache.path),
                            "free the disk or mend its rights") from None
        return cache

    def read(self, windows: Sequence[Sequence[str]]) -> dict[int, tuple[str, ...] | None]:
        """By window number, the ranking (question ids) or None for one that could not be had. UserError if damaged."""
        lines = self._whole_lines()
        if not lines or _parse(lines[0]) != {"key": self.key}:
            raise self._damaged(1)
        known: dict[int, tuple[str, ...] | None] = {}
        for number, line in enumerate(lines[1:], 2):
            row = _parse(line)
            if row is None or not _belongs(row, windows):
                raise self._damaged(number)
            known[row["window"]] = None if row["ranking"] is None else tuple(row["ranking"])
        return known

    def append(self, window: int, ids: Sequence[str], ranking: Sequence[str] | None) -> None:
        """Writes one window's ranking, as one line that is on disk when this returns."""
        row = {"window": window, "ids": list(ids), "ranking": None if ranking is None else list(ranking)}
        with open(self.path, "ab") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[bytes]:
        """The file's lines; what a killed run left of its last one is cut off, on disk too."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole and len(whole) < len(content):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        return whole.splitlines()

    def _damaged(self, line: int) -> UserError:
        where = f"{self.path}, line {line}"
        return UserError("the cache of rankings is damaged", where, "delete the file: it is made anew")


def _line(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(row, sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The row, None where the line is not what was written."""
    checksum, _, text = line.partition(b" ")
    return json.loads(text) if checksum == b"%08x" % zlib.crc32(text) else None


def _belongs(row: Mapping[str, Any], windows: Sequence[Sequence[str]]) -> bool:
    """Whether a row is of one of these windows and ranks the questions of it."""
    number = row.get("window")
    if not isinstance(number, int) or not 0 <= number < len(windows) or row["ids"] != list(windows[number]):
        return False
    return row["ranking"] is None or sorted(row["ranking"]) == sorted(row["ids"])
