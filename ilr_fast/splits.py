"""The training, validation and held-out questions of a config, checked to share no problem."""

from __future__ import annotations

from collections.abc import Sequence

from ilr_fast.config import DataConfig
from ilr_fast.data import check_disjoint, load_questions
from ilr_fast.errors import UserError
from ilr_fast.tasks import splits
from ilr_fast.types import Question

PARTS = ("train", "validation", "test")


def load_splits(data: DataConfig, seed: int) -> dict[str, Sequence[Question]]:
    """Questions by part. A generated task (`task:NAME`) makes all three; files and Hub names may be mixed.

    Raises UserError for anything that can't be read, and for a problem that stands in two parts.
    """
    sources = {part: getattr(data, part) for part in PARTS}
    sizes = {part: getattr(data, f"{part}_size") for part in PARTS}
    tasks = {source for source in sources.values() if source.startswith("task:")}
    if tasks:
        return _generated(sources, sizes, data, seed)
    found = {
        part: load_questions(source, limit=sizes[part], question_key=data.question_key, answer_key=data.answer_key)
        for part, source in sources.items()
    }
    check_disjoint(found)
    return dict(found)


def _generated(sources: dict[str, str], sizes: dict[str, int | None], data: DataConfig, seed: int) -> dict:
    if len(set(sources.values())) > 1:
        raise UserError("a generated task makes all three parts, and they name different sources",
                        "data.train, data.validation, data.test", "give the same task: to all three")
    for part, size in sizes.items():
        if size is None:
            raise UserError("a generated task needs to know how many", f"data.{part}_size", "give a number")
    task = sources["train"].removeprefix("task:")
    return splits(task, {part: size or 0 for part, size in sizes.items()}, seed, options=data.task_options)
