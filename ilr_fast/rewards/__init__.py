"""Rewards: what a text is worth as an answer to a question.

A reward is graded (ILR.md section 3 says why two values would make calibration a no-op):

    reward = 1 if the answer is right, else 0; plus `format_weight` if it is in the asked form

    with make_grader("number") as grader:
        grader.grade(question, "= 760")        # Grade(reward=1.1, correct=True, formatted=True, answer="760")

A text that is wrong, hostile, or runs the verifier into its time limit is worth 0. Only where the verifier itself
broke is the reward None, so that the sample is counted and left out. `make_grader` names the graders; each is one
file here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

if TYPE_CHECKING:  # verifier processes import this package too, many times a step: it must stay light
    from collections.abc import Sequence

    from ilr_fast.types import Grade, Question

GRADERS = {
    "math": "ilr_fast.rewards.math:MathGrader",
    "number": "ilr_fast.rewards.number:NumberGrader",
    "steps": "ilr_fast.rewards.steps:StepsGrader",
    "choice": "ilr_fast.rewards.choice:ChoiceGrader",
    "code": "ilr_fast.rewards.code:CodeGrader",
    "task": "ilr_fast.rewards.task:TaskGrader",
}


@runtime_checkable
class Grader(Protocol):
    """Grades texts; may be called from several threads. `close` ends its processes; it may be used as a context."""

    def grade(self, question: Question, text: str) -> Grade:
        """The verdict on one text. Never raises for what a text holds."""
        ...

    def grade_many(self, pairs: Sequence[tuple[Question, str]]) -> list[Grade]:
        """The verdicts in the order of `pairs`, on as many verifier processes as the grader has."""
        ...

    def close(self) -> None:
        """Ends the verifier processes. Calling it twice is harmless."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def make_grader(
    name: str, *, format_weight: float = 0.1, time_limit: float = 5.0, workers: int = 1, **options: Any
) -> Grader:
    """The grader called `name`, or the user's own as `module:Class`.

    `format_weight`: reward for the asked form. `time_limit`: seconds for one answer. `workers`: verifier processes.
    `options` are the grader's own. A user's class is given those of the arguments that its `__init__` names; it needs
    `grade(question, text) -> Grade`; where it has no `grade_many` or `close`, they are added.
    Raises UserError where the name is unknown, an option does not exist, or the grader cannot work on this machine.
    """
    import inspect

    from ilr_fast.errors import UserError, nearest
    from ilr_fast.rewards.base import Adapted

    made = grader_class(name)
    common = {"format_weight": format_weight, "time_limit": time_limit, "workers": workers}
    known = inspect.signature(made).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    for option in options:
        if option not in known and not takes_all:
            remedy = nearest(option, set(known) - {"self"}) if known else "leave it out: this grader takes no options"
            raise UserError(f"the grader {name!r} has no option {option!r}", "reward", remedy)
    given = {k: v for k, v in common.items() if takes_all or k in known} | options
    grader = made(**given)
    return grader if isinstance(grader, Grader) else Adapted(grader)


def grader_class(name: str) -> Any:
    """The class of the grader called `name`, or the user's own; UserError where there is none."""
    from ilr_fast.errors import UserError, nearest
    from ilr_fast.own import load_own

    if name not in GRADERS and ":" not in name:
        remedy = f"{nearest(name, GRADERS)}; or module:Class"
        raise UserError(f"there is no grader called {name!r}", "reward.name", remedy)
    found = load_own(GRADERS.get(name, name), "reward.name")
    if not callable(getattr(found, "grade", None)):
        raise UserError(f"{name!r} has no method grade(question, text)", "reward.name", "give a class that has it")
    return found


def overlong(tokens: int, limit: int, buffer: int) -> float:
    """The soft penalty for length of DAPO (arXiv 2503.14476, eq. 13), to be subtracted from a reward: 0 to 1.

    0 up to `limit - buffer` tokens, then growing linearly to 1 at `limit`; `buffer` 0 is off.

    >>> overlong(15, 20, 10)
    0.5
    """
    return min(1.0, max(0.0, (tokens - limit + buffer) / buffer)) if buffer > 0 else 0.0
