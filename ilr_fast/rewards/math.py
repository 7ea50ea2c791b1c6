r"""Mathematics: math-verify on the last \boxed{} of the text, in a process that is killed when it overruns.

    grader = make_grader("math", time_limit=5.0)
    grader.grade(question, r"… so it is \boxed{\frac{1}{2}}.")

The asked form is a \boxed{}; a text without one is wrong. Answers that need no algebra take no process: the same
LaTeX up to spacing, or two plain numbers. Of several values the order does not matter, and all must be there. A text
that runs the verifier out of time or memory is worth 0. So is a box far longer than the answer: it is not looked at.
"""

from __future__ import annotations

import importlib.util
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from ilr_fast.errors import UserError
from ilr_fast.rewards.base import BaseGrader, last_boxed
from ilr_fast.rewards.channel import Channel, Expired
from ilr_fast.rewards.pool import Broken, Pool, spawn_worker
from ilr_fast.types import Grade, Question

INTEGER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,18})")
DIGITS = "[0-9]{1,18}"
PLAIN = re.compile(  # sign; 12 or 1.5; 3/4; \frac{3}{4}
    rf"(-?)(?:({DIGITS}(?:\.{DIGITS})?|\.{DIGITS})|({DIGITS})/({DIGITS})|\\frac *\{{(-?{DIGITS})\}}\{{(-?{DIGITS})\}})"
)
NEAR = Fraction(1, 1000)  # math-verify calls 0.333333 and 1/3 equal; what is further apart than this is not
BASE = re.compile(r"_\{?([0-9]+)\}?$")  # 4343_6: math-verify reads the digits and drops the base
DECORATION = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!;: ]|\$|\.$")


class MathGrader(BaseGrader):
    """math-verify in `workers` processes of at most `memory_mib` each; `time_limit` seconds for one answer."""

    def __init__(
        self, format_weight: float = 0.1, time_limit: float = 5.0, workers: int = 1, memory_mib: int = 2048
    ):
        super().__init__(format_weight, workers)
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("the package math-verify is missing", "reward.name: math", "pip install math-verify")
        self.time_limit, self._pool = time_limit, Pool(lambda: self._spawn(memory_mib), workers)

    def grade(self, question: Question, text: str) -> Grade:
        """Compares the last box with the question's answer. An answer of the data that cannot be read gives None."""
        answer = last_boxed(text)
        if answer is None:
            return self.verdict(False, False, None)
        gold = question.answer
        easy = same_without_algebra(gold, answer)
        if easy is not None:
            return self.verdict(easy, True, answer)
        if len(answer) > 1000 + 4 * len(gold):
            return self.verdict(False, True, answer, "answer too long")
        return self._ask(gold, answer)

    def _ask(self, gold: str, answer: str) -> Grade:
        try:
            reply = self._pool.ask({"gold": gold, "answer": answer}, self.time_limit)
        except Expired:
            return self.timed_out(True, answer, f"timeout: the verifier took more than {self.time_limit:g} s")
        except Broken as error:
            return self.broken(True, answer, str(error))
        if "limit" in reply:
            return self.timed_out(True, answer, f"{reply['limit']} in the verifier")
        if "broken" in reply:
            return self.broken(True, answer, reply["broken"])
        return self.verdict(reply["correct"], True, answer)

    def close(self) -> None:
        """Kills the verifier processes."""
        self._pool.close()

    @staticmethod
    def _spawn(memory_mib: int) -> Channel:
        return spawn_worker("ilr_fast.rewards.math:verify", memory_mib)


def same_without_algebra(gold: str, answer: str) -> bool | None:
    """Whether two answers agree, where that shows without algebra: the same LaTeX, or plain numbers; else None."""
    if len(answer) > 4 * len(gold) + 200:
        return None
    gold_bare, answer_bare = _bare(gold), _bare(answer)
    if gold_bare and "".join(gold_bare.split()) == "".join(answer_bare.split()):
        return True
    bases = BASE.search(gold_bare), BASE.search(answer_bare)
    if all(bases) and bases[0][1] != bases[1][1]:  # type: ignore[index]
        return False
    if INTEGER.fullmatch(gold_bare) and INTEGER.fullmatch(answer_bare):
        return int(gold_bare.replace(",", "")) == int(answer_bare.replace(",", ""))
    one, other = plain_number(gold_bare), plain_number(answer_bare)
    if one is None or other is None:
        return None
    apart = abs(one - other) > NEAR * max(abs(one), abs(other), Fraction(1))
    return True if one == other else (False if apart else None)


def plain_number(bare: str) -> Fraction | None:
    """The value of an integer, a decimal or a fraction of integers; None for everything else."""
    found = PLAIN.fullmatch(bare)
    if found is None:
        return None
    sign, decimal, above, below, upper, lower = found.groups()
    if int(below or lower or 1) == 0:
        return None
    value = Fraction(decimal) if decimal else Fraction(int(above or upper), int(below or lower))
    return -value if sign else value


def _bare(latex: str) -> str:
    # braces and spaces stay: \frac{1}{23} is not \frac{12}{3}, and "2, 100" is not 2100
    return DECORATION.sub("", latex.replace(r"\$", "").replace("dfrac", "frac").replace("tfrac", "frac")).strip()


def verify(request: dict[str, Any] | None) -> dict[str, Any]:
    """In the verifier process: whether `answer` equals `gold`, both the inside of a box. None only imports."""
    from math_verify import verify as equal

    from ilr_fast.rewards import math_quick

    if request is None:
        math_quick.install()
        equal(list(_read("x^2 - 1")), list(_read("(x - 1)(x + 1)")), timeout_seconds=0)  # what is imported on first use
        return {}
    gold = _read(request["gold"])
    if not gold:
        return {"broken": f"math-verify cannot read the answer {request['gold'][:100]!r} of the data"}
    return {"correct": bool(equal(list(gold), list(_read(request["answer"])), timeout_seconds=0))}


@lru_cache(maxsize=4096)  # a question's answer is compared with those of a whole group, many of which are equal
def _read(latex: str) -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig, parse

    plain = latex.replace(r"\$", "").replace("$", "").strip().removesuffix(".")  # "8/5 + 1/5 i." reads as 1/5
    return tuple(parse(rf"\boxed{{{plain}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=0))
