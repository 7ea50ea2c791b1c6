"""Whether a grader can judge a data set at all, found out before anything is loaded: on the data's own answers.

    with open_grader(config) as grader:
        check_gradable(grader, questions, "data.train, reward.name = code")   # UserError: … has no tests
"""

from __future__ import annotations

from collections.abc import Sequence

from ilr_fast.errors import UserError
from ilr_fast.rewards import Grader
from ilr_fast.types import Question

TRIED = 8  # of a data set, spread evenly: a file that does not fit the grader fits it nowhere


def check_gradable(grader: Grader, questions: Sequence[Question], where: str) -> None:
    """UserError, with the grader's own reason, where none of the questions tried gets a verdict on its gold answer.

    A few rows that can't be graded are no mistake of the config: `max_failed_share` bounds them while it runs.
    """
    tried = questions[:: max(1, len(questions) // TRIED)][:TRIED]
    errors = []
    for question in tried:
        grade = grader.grade(question, question.answer)
        if grade.reward is not None:
            return
        errors.append(f"{question.id!r}: {grade.error}")
    if errors:
        raise UserError(f"none of {len(errors)} questions tried can be graded; {errors[0]}", where,
                        "choose the reward that fits the data, or mend the data")
