r"""Options: a letter, or one of a few words such as yes and no.

The asked form is the option alone, "B", "(B)", "B.", "Answer: B", or in the last \boxed{} of a text. Otherwise the
text is right where it says "answer is (B)" (or "answer: B") and names no other option so; else, for letters, where
one single option stands in brackets. A text that names several options commits to none and is wrong.

The options are the grader's `options=["yes", "no"]`, or the question's `metadata["choices"]` (a list of that many
letters, or a mapping whose keys are the options), or, where the answer is a letter, A to J.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ilr_fast.rewards.base import BaseGrader, last_boxed
from ilr_fast.types import Grade, Question

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST = 20_000


class ChoiceGrader(BaseGrader):
    """Grades the choice of one option."""

    def __init__(self, format_weight: float = 0.1, workers: int = 1, options: Sequence[str] | None = None):
        super().__init__(format_weight, workers)
        self.options = options

    def grade(self, question: Question, text: str) -> Grade:
        """Reads the text by the rules of this module."""
        options = self._options(question)
        wanted = _bare(question.answer)
        if wanted not in options:
            return self.broken(False, None, f"the answer {question.answer[:50]!r} of the data is none of the options")
        alone = _alone(text, options)
        chosen = alone or _named(text[-LONGEST:], options)
        boxed = chosen is not None and last_boxed(text[-LONGEST:]) is not None
        return self.verdict(chosen == wanted, alone is not None or boxed, chosen)

    def _options(self, question: Question) -> list[str]:
        choices = self.options or question.metadata.get("choices")
        if isinstance(choices, Mapping) or self.options:
            return [_bare(str(choice)) for choice in choices or ()]
        if len(_bare(question.answer)) == 1:
            return list(LETTERS[: len(choices)] if choices else LETTERS[:10])
        return [_bare(str(choice)) for choice in choices or ()]


def _bare(text: str) -> str:
    """An option without brackets, period and case."""
    bare = text.strip().strip("().:*").strip()
    return bare.upper()


def _alone(text: str, options: Sequence[str]) -> str | None:
    """The option that the whole text is, in one of the asked forms."""
    text = text.strip()
    if len(text) > 200:
        return None
    inside = last_boxed(text)
    bare = _bare(re.sub(r"(?i)^answer\s*:", "", text if inside is None else re.sub(r"\\text\{(.*)\}", r"\1", inside)))
    return bare if bare in options else None


def _named(text: str, options: Sequence[str]) -> str | None:
    """The one option that the text names as its answer."""
    inside = last_boxed(text)
    if inside is not None:
        return _alone(inside, options)
    # a letter must be a capital: "the answer is a number" does not choose A
    patterns = [re.escape(o) if len(o) == 1 else f"(?i:{re.escape(o)})" for o in sorted(options, key=len, reverse=True)]
    any_option = "|".join(patterns)
    said = re.findall(rf"(?i:answer(?: is|:)\s*[*(]*)({any_option})\b", text)
    bracketed = re.findall(rf"\(({any_option})\)", text)
    chosen = {option.upper() for option in said or bracketed}
    return chosen.pop() if len(chosen) == 1 else None
