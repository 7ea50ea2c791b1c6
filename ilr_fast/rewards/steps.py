"""Worked solutions of several results on one line: reward for each that is reached, in order, before the first mistake.

    solution 12 + 7 = 19, 19 + 30 = 49, answer 49       correct   share   reward (format_weight 1)
    12 + 7 = 19, 19 + 30 = 49                           yes       1       2
    12 + 7 = 19, 19 + 30 = 48                           no        1/2     0.5
    12 + 7 = 19.0, 19 + 30 = 49                         yes       1       2
    12 + 7 = 19, so it is 19. Then 19 + 30 = 49.        yes       1       2
    49                                                  yes       0       1

    reward = 1 if the answer is right plus format_weight · share

The answer is the last result on the first line, or without any what `number` reads.

`share` is the part of the solution's results, the numbers after its equals signs, that the text's results agree with up
to the first that differs. A model that gets no long sum right can learn from such rewards, and they have several
values, without which Perception Calibration changes nothing (docs/calibration.md). Evaluation counts right answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import takewhile

from ilr_fast.rewards.base import BaseGrader
from ilr_fast.rewards.number import LONGEST_LINE, NUMBER, read_number
from ilr_fast.types import Grade, Question

RESULT = re.compile(rf"=\s*({NUMBER.pattern})")


class StepsGrader(BaseGrader):
    """Grades the first line of a text against the results of the question's worked solution."""

    def grade(self, question: Question, text: str) -> Grade:
        """An answer of the data that is no number, or a solution without results, gives reward None."""
        wanted, results = read_number(question.answer), found(question.solution or "")
        if wanted is None or not results:
            what = "the answer of the data must be a number, and its solution show results (1 + 2 = 3)"
            return self.broken(False, None, what)
        given = found(text)
        number = given[-1] if given else read_number(text)
        share = reached(given, results)
        answer = None if number is None else f"{number:f}"[:200]
        right = number == wanted
        return Grade(float(right) + self.format_weight * share, right, right and share == 1, answer)


def found(text: str) -> list[Decimal]:
    """The results on the first line that is not empty, at most LONGEST_LINE characters of it.

    >>> [str(result) for result in found("1 + 2 = 3, 3 + 4 = 7")]
    ['3', '7']
    """
    line = next((line for line in text[: 2 * LONGEST_LINE].splitlines() if line.strip()), "")
    return [Decimal(result.replace(",", "")) for result in RESULT.findall(line[:LONGEST_LINE])]


def reached(given: Sequence[Decimal], wanted: Sequence[Decimal]) -> float:
    """The part of the wanted results that the given ones equal as numbers up to the first difference, 0 to 1.

    >>> reached(found("1 + 2 = 3.0, 3 + 4 = 8"), found("1 + 2 = 3, 3 + 4 = 7"))
    0.5
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(given, wanted, strict=False))) / len(wanted)
