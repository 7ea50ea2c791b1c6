"""What every grader shares: how a verdict becomes a reward, many at a time, and the last \\boxed{} of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from ilr_fast.types import Grade, Question


class BaseGrader:
    """Subclasses write `grade`; those with verifier processes also `close`."""

    def __init__(self, format_weight: float = 0.1, workers: int = 1):
        self.format_weight, self.workers = format_weight, workers

    def grade(self, question: Question, text: str) -> Grade:
        """The verdict on one text."""
        raise TypeError(f"{type(self).__name__} must define grade(question, text)")

    def grade_many(self, pairs: Sequence[tuple[Question, str]]) -> list[Grade]:
        """The verdicts in order. With several workers, as many threads wait for them."""
        if self.workers == 1 or len(pairs) < 2:
            return [self.grade(question, text) for question, text in pairs]
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(lambda pair: self.grade(*pair), pairs))

    def close(self) -> None:
        """Nothing to end here."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def verdict(self, correct: bool, formatted: bool, answer: str | None, error: str | None = None) -> Grade:
        """Grade of an answer that was looked at: 1 for right plus `format_weight` for the asked form."""
        shown = None if answer is None else answer[:200]  # logged with every dialogue
        return Grade(float(correct) + self.format_weight * formatted, correct, formatted, shown, error)

    def timed_out(self, formatted: bool, answer: str | None, limit: str) -> Grade:
        """Grade of a text that ran the verifier into a limit: wrong, and its form earns nothing either."""
        return Grade(0.0, False, formatted, None if answer is None else answer[:200], limit)

    def broken(self, formatted: bool, answer: str | None, error: str) -> Grade:
        """Grade where the verifier itself failed: the sample is left out."""
        return Grade(None, False, formatted, None if answer is None else answer[:200], error)


class Adapted(BaseGrader):
    """A user's object that has only `grade`: what it raises becomes a Grade without a reward."""

    def __init__(self, grader: Any):
        super().__init__()
        self.grader = grader

    def grade(self, question: Question, text: str) -> Grade:
        """The user's verdict."""
        try:
            return self.grader.grade(question, text)
        except Exception as error:  # the user's code, whatever it raises
            return self.broken(False, None, f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Closes the user's object where it can be closed."""
        close: Callable[[], None] | None = getattr(self.grader, "close", None)
        if close is not None:
            close()


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}` (or `\fbox{…}`), braces matched; None without one that is closed.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    opening = text.find("{", start)
    if opening < 0 or text[start:opening].strip() not in (r"\boxed", r"\fbox"):
        return None
    depth = 0
    for i in range(opening, len(text)):
        escaped = text[i - 1] == "\\" and text[i - 2] != "\\"  # \{ and \} are set braces
        if text[i] in "{}" and not escaped:
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[opening + 1 : i].strip()
    return None
