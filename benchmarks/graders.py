"""The graders on every row of the data sets in ILR_DATA, and how fast they are.

    ilr-fast bench graders                  # --quick: a few rows of each

For every row: the gold answer in the asked form must be right, by the grader and, for mathematics, by its verifier
too (the shortcut for equal texts would call anything right); the written solution must be right where it ends in a
box; and a perturbed answer must be wrong. MBPP's reference programs must pass in the sandbox within `MBPP_LIMIT`
seconds (task 123 alone needs more than 10), and programs of the same names that return nothing must not. Then 20,000
gradings in the mix of a training step, and texts that are made to hang the verifier. A row's `error` is its share of
wrong verdicts; more than half a percent (and than one) is a failure, and each is listed with its texts.
"""

from __future__ import annotations

import ast
import itertools
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ilr_benchmarks.common import row

from ilr_fast.data import load_questions
from ilr_fast.errors import UserError
from ilr_fast.rewards import Grader, make_grader
from ilr_fast.rewards.base import last_boxed
from ilr_fast.rewards.math import MathGrader
from ilr_fast.types import Question

WORKERS = 2  # verifiers while the clock runs
CHECKERS = max(WORKERS, min(4, os.cpu_count() or 1))  # verifiers of the checks
MOST_WRONG = 0.005
CALLS, CALLS_LIMIT = 20_000, 60.0  # seconds
MATH_LIMIT, MBPP_LIMIT = 5.0, 60.0  # seconds for one answer; task 123 of MBPP takes 10 to 30
HOSTILE = (
    "10^{10^{10}}", "9^{9^{9^{9}}}", "(10^{100})!", "(x+1)^{100000}", r"\sqrt{" * 200 + "2" + "}" * 200,
    r"\sum_{n=1}^{10^{12}} \frac{1}{n}", r"\int_0^1 x^x \sin(x^x) dx", "(" * 3000 + "1" + ")" * 3000, "1" * 100_000,
    r"\frac{1}{" * 500 + "2" + "}" * 500, r"\binom{10^9}{5 \cdot 10^8}", "x^{x^{x^{x^{x}}}} = 2",
)  # fmt: skip


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """One row for each data set and check, one for the speed, one for texts that would hang."""
    folder = Path(os.environ.get("ILR_DATA", ""))
    files = sorted(folder.glob("*.jsonl")) if str(folder) != "." else []
    if not files:
        raise UserError("no data sets there", "ILR_DATA", "export ILR_DATA=a folder with their JSONL files")
    limit = 12 if quick else None
    mathematics: list[Question] = []
    with make_grader("math", time_limit=MATH_LIMIT, workers=CHECKERS) as grader:
        for file in (file for file in files if not file.stem.startswith("mbpp")):
            questions = load_questions(str(file), limit=limit)
            mathematics += questions
            yield from _math_rows(file.stem, questions, grader)
    with make_grader("math", time_limit=MATH_LIMIT, workers=WORKERS) as grader:
        yield _speed(mathematics, grader, 200 if quick else CALLS)
        yield _hostile(mathematics[0], grader)
    with make_grader("code", time_limit=MBPP_LIMIT, workers=CHECKERS) as grader:
        for file in (file for file in files if file.stem.startswith("mbpp")):
            yield from _code_rows(file.stem, load_questions(str(file), limit=limit), grader)


def _math_rows(name: str, questions: Sequence[Question], grader: Grader) -> Iterator[dict[str, Any]]:
    assert isinstance(grader, MathGrader)
    boxed = [(q, rf"\boxed{{{q.answer}}}") for q in questions]
    yield _checked(name, "gold answer", boxed, grader.grade_many, right=True)
    bare = [(q, q.answer) for q in questions]
    yield _checked(name, "gold answer by the verifier", bare, _Verifier(grader).grade_many, right=True)
    solved = [(q, q.solution) for q in questions if q.solution and last_boxed(q.solution)]
    if solved:
        yield _checked(name, "written solution", solved, grader.grade_many, right=True)
    yield _checked(name, "perturbed answer", [(q, rf"\boxed{{{perturbed(q.answer)}}}") for q in questions],
                   grader.grade_many, right=False)  # fmt: skip


class _Verifier:
    """The grader without its shortcuts: every answer goes to the process with math-verify."""

    def __init__(self, grader: MathGrader):
        self._grader = grader

    def grade_many(self, pairs: Sequence[tuple[Question, str]]) -> list[Any]:
        with ThreadPoolExecutor(CHECKERS) as threads:
            return list(threads.map(lambda pair: self._grader._ask(pair[0].answer, pair[1]), pairs))


def _code_rows(name: str, questions: Sequence[Question], grader: Grader) -> Iterator[dict[str, Any]]:
    fenced = [(q, f"```python\n{q.answer}\n```") for q in questions]
    yield _checked(name, f"reference program, {MBPP_LIMIT:g} s", fenced, grader.grade_many, right=True)
    empty = [(q, f"```python\n{without_bodies(q.answer)}\n```") for q in questions]
    yield _checked(name, "program that returns nothing", empty, grader.grade_many, right=False)


def _checked(
    name: str, what: str, pairs: Sequence[tuple[Question, str]], grade_many: Any, *, right: bool
) -> dict[str, Any]:
    """One row: the verdicts that are not as they must be, each with its texts and the grader's reason."""
    start = time.perf_counter()
    grades = grade_many(pairs)
    seconds = time.perf_counter() - start
    wrong = [
        {"id": q.id, "answer": q.answer[:200], "text": text[-200:], "read": grade.answer, "reason": grade.error}
        for (q, text), grade in zip(pairs, grades, strict=True) if grade.correct is not right or grade.reward is None
    ]  # fmt: skip
    share = len(wrong) / len(pairs)
    too_many = len(wrong) > max(1, MOST_WRONG * len(pairs))
    status = {"status": f"wrong: {len(wrong)} of {len(pairs)}"} if too_many else {}
    return row(f"{what}: {'right' if right else 'wrong'}", f"{name}, {len(pairs)} rows", [seconds], error=share,
               calls=len(pairs), exceptions=wrong, **status)  # fmt: skip


def _speed(questions: Sequence[Question], grader: Grader, calls: int) -> dict[str, Any]:
    """Answers of a training step: gold ones, those of other questions, perturbed ones, and texts without an answer."""
    draw = random.Random(0)
    pairs = []
    for q in itertools.islice(itertools.cycle(draw.sample(list(questions), len(questions))), calls):
        kind = draw.randrange(4)
        answer = (q.answer, draw.choice(questions).answer, perturbed(q.answer))[kind] if kind < 3 else None
        pairs.append((q, "I do not know." if answer is None else rf"So it is \boxed{{{answer}}}."))
    grader.grade_many(pairs[:20])  # the processes start
    start, busy = time.perf_counter(), _cpu_seconds(grader)
    grades = grader.grade_many(pairs)
    seconds, busy = time.perf_counter() - start, _cpu_seconds(grader) - busy
    timeouts = sum("timeout" in (grade.error or "") for grade in grades)
    failed = sum(grade.reward is None for grade in grades)
    status = {"status": f"wrong: {seconds:.0f} s"} if seconds > CALLS_LIMIT * calls / CALLS else {}
    return row(f"{WORKERS} verifiers", f"{calls} answers graded", [seconds], error=failed / calls,
               limit_seconds=CALLS_LIMIT * calls / CALLS, calls=calls, timeouts=timeouts, cpu_seconds=busy, **status)


def _cpu_seconds(grader: Grader) -> float:
    """CPU time of this process and of the verifiers that run: what the work takes where other programs run too."""
    assert isinstance(grader, MathGrader)
    fields = [Path(f"/proc/{c.process.pid}/stat").read_text().rsplit(")", 1)[1].split() for c in grader._pool._all]
    return time.process_time() + sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def _hostile(question: Question, grader: Grader) -> dict[str, Any]:
    """Gradings of texts that would run for ever: each ends at the grader's limit, and the next starts a verifier."""
    took = []
    for text in HOSTILE:
        start = time.perf_counter()
        grade = grader.grade(question, rf"\boxed{{{text}}}")
        took.append(time.perf_counter() - start)
        assert not grade.correct, text
    over = max(took) > 3 * MATH_LIMIT  # a request is tried twice where its verifier died
    status = {"status": f"wrong: {max(took):.1f} s"} if over else {}
    return row("each ends", f"{len(HOSTILE)} texts made to hang a verifier", took, error=0.0,
               limit_seconds=MATH_LIMIT, calls=len(HOSTILE), **status)


def perturbed(answer: str) -> str:
    """An answer that is near and wrong: its first number is larger by one; without a number, its text goes on.

    >>> perturbed("3/4 cm^2")
    '4/4 cm^2'
    """
    first = re.search(r"\d+", answer)
    if first is None:
        return rf"\text{{not {answer}}}" if answer.isalpha() and len(answer) > 1 else f"{answer} + 1"
    return answer[: first.start()] + str(int(first[0]) + 1) + answer[first.end() :]


def without_bodies(program: str) -> str:
    """A program that defines the same functions and classes, all of which return nothing."""
    names = [n for n in ast.parse(program).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return "\n".join(_empty(n.name) for n in names) or "pass"


def _empty(name: str) -> str:
    return f"def {name}(*args, **kwargs):\n    return None"

