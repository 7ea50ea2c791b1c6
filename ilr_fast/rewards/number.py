r"""Plain numbers: the answer is one number on the first line of the text.

    text                        correct for 760    formatted
    760 · = 760 · \boxed{760}   yes                yes
    436 + 324 = 760             yes                no
    The answer is 760.          yes                no
    436, 760, 20                no: a list commits to nothing
    12 + 760                    no

The rules, in order. The line is the first that is not empty. A \boxed{} in it stands for the line. An equation,
arithmetic without letters up to a `=`, commits to the one number after its last `=`. Otherwise the line must hold
exactly one distinct number. Numbers are compared as decimals: "1,234.50" is 1234.5, with thousands separators only in
groups of three. A fraction or "1e5" reads as two numbers and so is wrong; `math` reads those. The form is right where
the whole text is one number alone, after an optional `=`, or in \boxed{}.
"""

from __future__ import annotations

import re
from decimal import Decimal
from functools import lru_cache

from ilr_fast.rewards.base import BaseGrader, last_boxed
from ilr_fast.types import Grade, Question

LONGEST_LINE = 1000
WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
NUMBER = re.compile(rf"(?:(?<![0-9.)\w])-)?(?:{WHOLE}(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)")
ALONE = re.compile(rf"=?\s*\$?({NUMBER.pattern})\.?", re.ASCII)
ARITHMETIC = re.compile(r"[-+*/×÷().,=\s0-9]*")


class NumberGrader(BaseGrader):
    """Grades one number. The question's answer must itself read as one number."""

    def grade(self, question: Question, text: str) -> Grade:
        """Reads the text by the rules of this module; an answer of the data that is no number gives reward None."""
        formatted = ALONE.fullmatch(_plain(unboxed(text.strip()))) is not None if len(text) <= LONGEST_LINE else False
        wanted = read_number(question.answer)
        if wanted is None:
            return self.broken(formatted, None, f"the answer {question.answer[:50]!r} of the data is not a number")
        number = read_number(text)
        return self.verdict(number == wanted, formatted, None if number is None else f"{number:f}")


@lru_cache(maxsize=1024)  # samples of a question give the same answers
def read_number(text: str) -> Decimal | None:
    """The number that a text commits to on its first line; None where it holds none, or several."""
    line = next((line.strip() for line in text[: 2 * LONGEST_LINE].splitlines() if line.strip()), "")
    if len(line) > LONGEST_LINE:
        return None
    line = _plain(unboxed(line))
    before, equals, after = line.rpartition("=")
    if equals and ARITHMETIC.fullmatch(before):
        line = after
    numbers = {Decimal(match.replace(",", "")) for match in NUMBER.findall(line)}
    return numbers.pop() if len(numbers) == 1 else None


def unboxed(line: str) -> str:
    r"""The inside of the line's last \boxed{}, else the line."""
    inside = last_boxed(line)
    return line if inside is None else inside


def _plain(line: str) -> str:
    return line.replace("\u2212", "-").strip().strip("$").strip()
