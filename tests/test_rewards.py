"""Graders without processes (numbers, options), how rewards are graded, and how a grader is named and made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ilr_fast.errors import UserError
from ilr_fast.rewards import GRADERS, Grader, make_grader, overlong
from ilr_fast.rewards.base import last_boxed
from ilr_fast.types import Question


def question(answer: str, **metadata: object) -> Question:
    return Question(id="q", text="?", answer=answer, metadata=metadata)


@pytest.mark.parametrize(
    ("answer", "text", "correct", "formatted"),
    [
        ("760", "760", True, True),
        ("760", " 760.\n", True, True),
        ("760", "= 760", True, True),
        ("760", "=760.", True, True),
        ("760", r"\boxed{760}", True, True),
        ("760", "$760", True, True),
        ("760", "436", False, True),
        ("760", "The answer is 760.", True, False),
        ("760", "760 is the largest", True, False),
        ("760", "760 760", True, False),
        ("760", "760\n\nWhich number is the largest: 1, 2, 3?", True, False),
        ("760", "436, 760, 20", False, False),
        ("760", "436,760", False, True),  # a thousands separator, so 436760
        ("436760", "436,760", True, True),
        ("760", "436 or 760", False, False),
        ("760", "436\n760", False, False),
        ("19", "12 + 7 = 19", True, False),
        ("19", "12 + 7 = 10 + 9 = 19", True, False),
        ("19", "12 + 7 = 19 or 20", False, False),
        ("19", "12 = 7 = 19", True, False),  # the last side is the one answer
        ("19", "x = 12, y = 19", False, False),
        ("19", "12 + 7", False, False),
        ("19", "12 plus 7 is 19", False, False),
        ("-5", "-5", True, True),
        ("-5", "\u22125", True, True),
        ("5", "-5", False, True),
        ("3", "5-3", False, False),
        ("1234.5", "1,234.50", True, True),
        ("0.5", ".5", True, True),
        ("1", "1/2", False, False),
        ("1", "1e5", False, False),
        ("7", "seven", False, False),
        ("7", "", False, False),
        ("7", "7" * 5000, False, False),
        ("7", "x " * 100_000 + "7", False, False),
        ("760", r"436 \boxed{760}", True, True),
    ],
)
def test_number(answer: str, text: str, correct: bool, formatted: bool):
    grade = make_grader("number").grade(question(answer), text)
    assert (grade.correct, grade.formatted) == (correct, formatted)
    assert grade.reward == pytest.approx(correct + 0.1 * formatted)


def test_number_of_data_that_is_no_number_has_no_reward():
    grade = make_grader("number").grade(question("1/2"), "0.5")
    assert grade.reward is None and "not a number" in str(grade.error)


@pytest.mark.parametrize(
    ("answer", "text", "correct", "formatted"),
    [
        ("B", "B", True, True),
        ("B", "(b).", True, True),
        ("B", "Answer: B", True, True),
        ("B", r"\boxed{\text{B}}", True, True),
        ("(B)", "B", True, True),
        ("B", "C", False, True),
        ("B", "The answer is B.", True, False),
        ("B", "The answer is (B), because (A) is too small.", True, False),
        ("B", "It cannot be less, so (B).", True, False),
        ("B", "(A) or (B)", False, False),
        ("B", "The answer is A. The answer is B.", False, False),
        ("A", "The answer is a number.", False, False),
        ("B", "", False, False),
        ("B", "(" * 100_000, False, False),
    ],
)
def test_choice(answer: str, text: str, correct: bool, formatted: bool):
    grade = make_grader("choice").grade(question(answer), text)
    assert (grade.correct, grade.formatted) == (correct, formatted)


def test_choice_of_words_and_of_the_datas_options():
    words = make_grader("choice", options=["yes", "no"])
    assert words.grade(question("yes"), "Yes.").reward == 1.1
    assert words.grade(question("yes"), "The answer is no").reward == 0
    assert words.grade(question("maybe"), "yes").reward is None
    two = question("B", choices=["red", "blue"])
    assert make_grader("choice").grade(two, "B").correct
    assert not make_grader("choice").grade(two, "C").formatted


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
        (r"\boxed {3}", "3"),
        (r"\boxed{3", None),
        (r"\boxed 3", None),
        ("3", None),
        (r"\boxed{1} \boxed{", None),
    ],
)
def test_last_boxed(text: str, inside: str | None):
    assert last_boxed(text) == inside


def test_overlong_grows_from_the_buffer_to_the_limit():
    values = [overlong(tokens, 20, 10) for tokens in (0, 10, 11, 15, 20, 99)]
    assert values == pytest.approx([0, 0, 0.1, 0.5, 1, 1])
    assert overlong(99, 20, 0) == 0


def test_grades_take_more_than_two_values_unless_the_weight_is_zero():
    texts = ["760", "The answer is 760", "20", "no idea"]
    for weight, values in ((0.1, [1.1, 1, 0.1, 0]), (0, [1, 1, 0, 0])):
        with make_grader("number", format_weight=weight) as grader:
            grades = grader.grade_many([(question("760"), text) for text in texts])
        assert [grade.reward for grade in grades] == values


def test_unknown_names_and_options_are_the_users_mistake():
    with pytest.raises(UserError, match="'math'"):
        make_grader("maths")
    with pytest.raises(UserError, match="'options'"):
        make_grader("choice", option=["yes"])
    with pytest.raises(UserError, match="can't import"):
        make_grader("no_such_module:Grader")
    with pytest.raises(UserError, match="'Question'"):
        make_grader("ilr_fast.types:Questions")
    with pytest.raises(UserError, match="grade"):
        make_grader("builtins:dict")


def test_a_users_grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_reward.py").write_text(
        "from ilr_fast.types import Grade\n"
        "class Length:\n"
        "    def __init__(self, format_weight, best=3): self.weight, self.best = format_weight, best\n"
        "    def grade(self, question, text):\n"
        "        if text == 'crash': raise KeyError('oh')\n"
        "        return Grade(float(len(text) == self.best), True, True)\n"
    )
    monkeypatch.chdir(tmp_path)
    with make_grader("my_reward:Length", best=4) as grader:
        assert isinstance(grader, Grader)
        rewards = [grade.reward for grade in grader.grade_many([(question(""), t) for t in ("four", "no", "crash")])]
        assert rewards == [1, 0, None]


def test_what_verifier_processes_import_is_light():
    code = "import sys, ilr_fast.rewards.worker, ilr_fast.rewards.math, ilr_fast.rewards.task\nprint(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "transformers", "sympy"} & set(modules)
    assert set(GRADERS) == {"math", "number", "steps", "choice", "code", "task"}
