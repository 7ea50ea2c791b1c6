"""Rows of multiple-choice data sets → the question with lettered options, and the letter of the right one.

    GPQA       columns Question, Correct Answer, Incorrect Answer 1 … 3 (and Record ID, Subdomain)
    MMLU-Pro   columns question, options (a list), answer (a letter) or answer_index (and question_id, category)

The options are shuffled by the seed and the question, so that no letter is right more often than the others (GPQA's
right answer always comes first in the data); the same seed gives the same letters. The grader is `choice`.

>>> as_question({"question": "2 + 2?", "options": ["3", "4"], "answer": "B", "question_id": 7}, seed=0)["answer"]
'A'
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
RIGHT, WRONG = "Correct Answer", "Incorrect Answer {}"
NAMES = {"Record ID": "id", "question_id": "id", "Subdomain": "subject", "category": "subject"}


def is_choice(row: Mapping[str, Any]) -> bool:
    """Whether the row has the columns of one of the data sets above; an empty list of options is none."""
    return RIGHT in row or (isinstance(row.get("options"), list) and bool(row["options"]) and "question" in row)


def as_question(row: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """The row as rows.py reads it: `question` with its options, `answer` as a letter, `choices` by letter.

    Raises ValueError, with what is wrong, for a row without a right answer among 2 to 26 options.
    """
    text, options, right = _gpqa(row) if RIGHT in row else _mmlu_pro(row)
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{len(options)} options; 2 to {len(LETTERS)} can have letters")
    none = [option for option in options if not _is_text(option)]
    if none:
        raise ValueError(f"an option is {json.dumps(none[0], default=str)} instead of text")
    options = [str(option).strip() for option in options]
    order = list(range(len(options)))
    random.Random(hashlib.sha256(f"{seed}/{text}".encode()).digest()).shuffle(order)
    lines = [f"({letter}) {options[place]}" for letter, place in zip(LETTERS, order, strict=False)]
    known = {name: row[column] for column, name in NAMES.items() if row.get(column) is not None}
    return {
        **known,
        **({"id": row["id"]} if "id" in row else {}),
        "question": "\n".join([text, *lines]),
        "answer": LETTERS[order.index(right)],
        "choices": {letter: options[place] for letter, place in zip(LETTERS, order, strict=False)},
    }


def _is_text(option: Any) -> bool:
    """Whether an option says something: a text, or a number as some data sets have them; NaN stands for a gap."""
    if isinstance(option, str):
        return bool(option.strip())
    return isinstance(option, int | float) and not isinstance(option, bool) and math.isfinite(option)


def _gpqa(row: Mapping[str, Any]) -> tuple[str, list[Any], int]:
    options = [row[RIGHT], *(row[key] for n in range(1, 26) if (key := WRONG.format(n)) in row)]
    return str(row.get("Question", "")).strip(), options, 0


def _mmlu_pro(row: Mapping[str, Any]) -> tuple[str, list[Any], int]:
    options: list[Any] = row["options"]
    answer = str(row.get("answer", "")).strip().strip("()").upper()
    told = row.get("answer_index")
    if isinstance(told, float):  # a column with gaps has floats, and NaN in them
        told = None if math.isnan(told) else int(told) if told.is_integer() else told
    index = LETTERS.find(answer) if len(answer) == 1 else told
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(options):
        raise ValueError(f"the answer {row.get('answer')!r} is none of the {len(options)} options")
    if told is not None and told != index:
        raise ValueError(f"the answer is {answer} and answer_index {told}, another option")
    return str(row["question"]).strip(), options, index
