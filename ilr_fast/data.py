"""Questions: where they come from, that the splits share none, and in which order training sees them.

    load_questions("problems.jsonl")                  rows with question and answer (rows.py says which columns count)
    load_questions("${ILR_DATA}/mbpp.jsonl#test")     of them, those whose column `split` is `test`
    load_questions("openai/gsm8k:main#train")         the Hub: name[:config][#split]
    load_questions("task:largest", limit=400)         generated (tasks.py)
    load_questions("math500")                         a benchmark by name (benchmark_sets.py)
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ilr_fast.benchmark_sets import BENCHMARKS, load_benchmark
from ilr_fast.config import DataConfig
from ilr_fast.errors import UserError, nearest
from ilr_fast.hub import hub_rows
from ilr_fast.rows import jsonl_rows, questions_of
from ilr_fast.tasks import find_task
from ilr_fast.tasks import splits as task_splits
from ilr_fast.types import Question

TASK = "task:"
TASK_SIZES = {"train": 1000, "validation": 200, "test": 200}  # of a generated task, where the config says nothing
_PARTS = ("train", "validation", "test")


def load_questions(
    source: str,
    *,
    limit: int | None = None,
    split: str | None = None,
    question_key: str = "question",
    answer_key: str = "answer",
    seed: int = 0,
    task_options: Mapping[str, Any] | None = None,
    where: str | None = None,
) -> list[Question]:
    """The first `limit` questions of `source`, which the module's docstring shows in all its forms.

    `split` is for sources that have several and name none (Hub and tasks: test). `seed` draws a task's problems and
    shuffles the options of a multiple choice (choices.py). `where` names the config key in errors. UserError for a
    source that is missing or empty, or has a row without question or answer.
    """
    where = where or f"source {source}"
    if source.startswith(TASK):
        part = split or "test"
        sizes = {part: limit or TASK_SIZES[part]}
        return task_splits(source.removeprefix(TASK), sizes, seed, task_options)[part]
    name, _, own_split = _expanded(source, where).partition("#")
    split = own_split or split
    if name in BENCHMARKS and not Path(name).exists():
        return load_benchmark(name, limit=limit, seed=seed)
    if _is_path(name):
        rows = jsonl_rows(_existing(name, where))
        kept = (row for row in rows if not own_split or row[1].get("split") == own_split)
        questions = questions_of(kept, Path(name).stem, question_key, answer_key, seed)
    else:
        questions = questions_of(hub_rows(name, split or "test", where), name, question_key, answer_key, seed)
    if not questions:
        what = f"no rows of the split {own_split!r}" if own_split else "no rows"
        raise UserError(f"{name} has {what}", where, "give a source with at least one question")
    return questions[:limit]


def load_splits(config: DataConfig, seed: int) -> dict[str, list[Question]]:
    """The questions of `train`, `validation` and `test`, which share none (`check_disjoint`).

    Parts that name the same task are drawn from it together. Of any other source that several parts name, the held-out
    ones take as many rows as their `_size` says, by the hashes of the ids, and training gets the rest. UserError names
    the config key.
    """
    splits: dict[str, list[Question]] = {}
    for part in _PARTS:
        source = getattr(config, part)
        if source.startswith(TASK):
            same = [p for p in _PARTS if getattr(config, p) == source]
            if part == same[0]:
                sizes = {p: getattr(config, f"{p}_size") or TASK_SIZES[p] for p in same}
                splits |= task_splits(source.removeprefix(TASK), sizes, seed, config.task_options)
        elif part not in splits:
            same = [p for p in _PARTS if getattr(config, p) == source]
            questions = load_questions(
                source, limit=getattr(config, f"{part}_size") if len(same) == 1 else None, split=part,
                question_key=config.question_key, answer_key=config.answer_key, where=f"data.{part} = {source}",
            )  # fmt: skip
            splits |= {part: questions} if len(same) == 1 else _dealt(questions, same, config)
    check_disjoint(splits)
    return {part: splits[part] for part in _PARTS}


def check_tasks(config: DataConfig) -> None:
    """UserError where a generated task is not known or its options don't fit it; no other source is looked at."""
    for source in dict.fromkeys(getattr(config, part) for part in _PARTS):
        if source.startswith(TASK):
            find_task(source.removeprefix(TASK), config.task_options)


def _dealt(questions: Sequence[Question], parts: Sequence[str], config: DataConfig) -> dict[str, list[Question]]:
    """One source's questions for several parts; a question's part depends on the ids and sizes alone."""
    order = sorted(questions, key=lambda q: hashlib.sha256(q.id.encode()).digest())
    dealt: dict[str, list[Question]] = {}
    for part in reversed(parts):  # test, validation, then train with what is left
        size = getattr(config, f"{part}_size")
        if size is None and part != "train":
            what = f"{' and '.join(parts)} name the same source, and nothing says how many of its rows {part} takes"
            raise UserError(what, f"data.{part}_size", "give a number, or another source")
        dealt[part], order = order[:size], order[len(order) if size is None else size :]
        if not dealt[part]:
            raise UserError("the held-out parts take all rows of the source", f"data.{part}", "lower their sizes")
    return dealt


def check_disjoint(splits: Mapping[str, Sequence[Question]], where: str | None = None) -> None:
    """UserError naming two rows, if two splits share an id, a text (but for case and spaces) or a canonical form.

    `where` names the config key; None: that of the second split.
    """
    owner: dict[tuple[str, str], tuple[str, str]] = {}
    for split, questions in splits.items():
        for question in questions:
            keys = {"id": question.id, "text": _normalised(question.text), "canonical form": question.canonical}
            for kind, value in keys.items():
                if value is None:
                    continue
                other, other_id = owner.setdefault((kind, value), (split, question.id))
                if other != split:
                    what = f"{question.id!r} of {split} and {other_id!r} of {other} have the same {kind}"
                    remedy = "take one out: held-out problems must not be trained on"
                    raise UserError(what, where or f"data.{split}", remedy)


class QuestionStream:
    """Training questions in an order that follows from seed and step alone, so that resuming needs the step only.

    Every epoch is a new shuffle; what is left of it after its last whole step is skipped, so that no step holds a
    question twice.
    """

    def __init__(self, questions: Sequence[Question], seed: int):
        self.questions, self.seed = tuple(questions), seed
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def questions_at(self, step: int, per_step: int) -> list[Question]:
        """The questions of `step`, which counts from 1. UserError if there are fewer than `per_step` in all."""
        assert step >= 1 and per_step >= 1
        steps = len(self.questions) // per_step  # of an epoch
        if steps == 0:
            what = f"a step takes {per_step} questions and there are {len(self.questions)}"
            raise UserError(what, "rollout.questions", "use fewer a step, or more training questions")
        epoch, position = divmod(step - 1, steps)
        order = self._order(epoch)[position * per_step : (position + 1) * per_step]
        return [self.questions[index] for index in order]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.questions)))
        digest = hashlib.sha256(f"{self.seed}/epoch {epoch}".encode()).digest()
        random.Random(digest).shuffle(order)
        return order


def _expanded(source: str, where: str) -> str:
    """`source` with ~ and ${VARIABLES} filled in."""
    expanded = os.path.expandvars(os.path.expanduser(source))
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise UserError(f"the variable {unset.group(1)} is not set", where, f"export {unset.group(1)}=…")
    return expanded


def _is_path(name: str) -> bool:
    looks_so = name.endswith((".jsonl", ".json")) or name.startswith((".", os.sep)) or "/" not in name
    return looks_so or Path(name).exists()


def _existing(name: str, where: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder", where, "give one of its JSONL files")
    beside = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
    hint = nearest(path.name, [*beside, *BENCHMARKS, "task:largest", "task:sums"])
    raise UserError(f"no file {path}", where, f"{hint}; or give a JSONL path, a Hub name or task:NAME")


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())
