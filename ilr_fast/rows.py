"""Rows of a data set → questions, with errors that name file, line and column.

A row is a JSON object with a question and an answer; `id`, `solution`, `level` ("Level 3" or 3), `subject` and
`canonical` are read where they are, everything else goes into the question's metadata. An answer in GSM8K's form
("… #### 18") is parted into solution and answer; a row with `test_list` shows its tests in the question, as MBPP's
programs can't be written without the names that the tests call. Multiple-choice rows are those of choices.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ilr_fast.choices import as_question, is_choice
from ilr_fast.errors import UserError
from ilr_fast.types import Question

_OWN = {"id", "solution", "level", "subject", "canonical"}
Row = Mapping[str, Any]


def jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a JSONL file, each with where it stands (file:line). UserError for what is not a JSON object."""
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the file can't be read ({error.strerror})", str(path), "give a JSONL file") from None
    with file:
        lines = enumerate(_decoded(file, path), start=1)
        for number, line in lines:
            if line.strip():
                yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _decoded(file: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"it is not UTF-8 ({error.reason})", str(path), "save it as UTF-8 JSONL") from None


def _parsed(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"broken JSON ({error.msg}, column {error.colno})"
        raise UserError(problem, where, "each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise UserError(f"a {type(row).__name__} instead of an object", where, "each line must be one JSON object")
    return row


def questions_of(
    rows: Iterable[tuple[str, Row]],
    name: str,
    question_key: str = "question",
    answer_key: str = "answer",
    seed: int = 0,
) -> list[Question]:
    """The questions of `rows`. `name` makes the ids of rows without one, `seed` shuffles a multiple choice's options.

    UserError for a bad row or a second id.
    """
    first: dict[str, str] = {}
    questions = []
    for number, (where, row) in enumerate(rows):
        if is_choice(row) and (question_key, answer_key) == ("question", "answer"):
            row = _choice(row, where, seed)
        question = _question(row, where, f"{name}/{number}", question_key, answer_key)
        if question.id in first:
            raise UserError(f"the id {question.id!r} stands at {first[question.id]} already", where,
                            "give every row an id of its own")  # fmt: skip
        first[question.id] = where
        questions.append(question)
    return questions


def _choice(row: Row, where: str, seed: int) -> Row:
    try:
        return as_question(row, seed=seed)
    except ValueError as error:
        raise UserError(str(error), where, "mend the row, or leave it out") from None


def _question(row: Row, where: str, default_id: str, question_key: str, answer_key: str) -> Question:
    text = _text(row, question_key, where, "data.question_key")
    answer = _text(row, answer_key, where, "data.answer_key")
    solution = row.get("solution")
    if solution is None and "####" in answer:
        solution, _, answer = (part.strip() for part in answer.rpartition("####"))
    return Question(
        id=str(row.get("id", default_id)),
        text=_with_tests(text, row.get("test_list")),
        answer=answer,
        solution=None if solution is None else str(solution),
        level=_level(row.get("level"), where),
        subject=None if row.get("subject") is None else str(row["subject"]),
        canonical=None if row.get("canonical") is None else str(row["canonical"]),
        metadata={key: value for key, value in row.items() if key not in _OWN | {question_key, answer_key}},
    )


def _text(row: Row, key: str, where: str, config_key: str) -> str:
    """A column's text: a string, a number, or a list of them. UserError where it is missing, empty or another type."""
    if key not in row:
        columns = ", ".join(map(str, row)) or "none"
        raise UserError(f"the row has no {key!r} (but {columns})", where, f"add it, or name its column by {config_key}")
    value = row[key]
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{key!r} is {kind}", where, "give text, a number, or a list of them")
    text = ", ".join(str(item).strip() for item in items)
    if not text:
        raise UserError(f"{key!r} is empty", where, "fill it in, or leave the row out")
    return text


def _level(value: Any, where: str) -> int | None:
    """3 for 3, "3" and "Level 3"; None where the data does not know ("Level ?")."""
    found = re.search(r"-?\d+", str(value)) if isinstance(value, int | str) else None
    if found is None:
        return None
    if int(found.group()) < 1:
        raise UserError(f"the level {value!r}", where, "levels count from 1")
    return int(found.group())


def _with_tests(text: str, tests: Any) -> str:
    if not isinstance(tests, list) or not tests:
        return text
    return "\n".join([text.rstrip(), "Your program must pass these tests:", *map(str, tests)])
