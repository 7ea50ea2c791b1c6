"""Generated tasks: reasoning-gym's scorers, their partial scores, and texts that they would evaluate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ilr_fast.rewards import Grader, make_grader
from ilr_fast.rewards.task import Refused, find_answer, safe_eval, safe_expression
from ilr_fast.types import Question

reasoning_gym = pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with make_grader("task", time_limit=1) as made:
        yield made


def first(name: str) -> tuple[dict, Question]:
    entry = reasoning_gym.create_dataset(name, size=1, seed=3)[0]
    return entry, Question(id="q", text=entry["question"], answer=str(entry["answer"]), metadata=entry["metadata"])


@pytest.mark.parametrize("name", ["chain_sum", "spiral_matrix", "countdown", "prime_factorization", "n_queens"])
def test_the_entrys_answer_is_right(grader: Grader, name: str):
    entry, question = first(name)
    grade = grader.grade(question, f"I think <answer>{entry['answer']}</answer>")
    assert grade.correct and grade.reward == 1.1
    whole = Question(id="q", text=question.text, answer=question.answer, metadata={"entry": entry})
    assert grader.grade(whole, str(entry["answer"])).correct
    assert not grader.grade(question, "no idea\nat all").correct


def test_a_scorers_part_of_the_score_counts(grader: Grader):
    entry, question = first("spiral_matrix")
    as_list = str([int(n) for n in entry["answer"].split()])
    grade = grader.grade(question, f"<answer>{as_list}</answer>")
    assert not grade.correct and grade.reward == pytest.approx(0.1 + 0.1)


@pytest.mark.parametrize("name", ["spiral_matrix", "countdown", "prime_factorization"])
@pytest.mark.parametrize("text", ["__import__('os').system('touch {}')", "exec(chr(105))", "9**9**9**9"])
def test_texts_are_never_run(grader: Grader, tmp_path: Path, name: str, text: str):
    _, question = first(name)
    grade = grader.grade(question, f"<answer>{text.format(tmp_path / 'harm')}</answer>")
    assert grade.reward is not None and grade.reward < 0.2 and not grade.correct
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["f(1)", "x", "[].append", "[i for i in (1,)]", "f'{1}'", "(lambda: 1)()", "a.b"])
def test_safe_eval_refuses_code(text: str):
    with pytest.raises(Refused):
        safe_eval(text)


def test_safe_eval_and_expression_take_arithmetic():
    assert safe_eval("[1, (2 + 3) * -4, 'a']") == [1, -20, "a"]
    assert safe_expression("3*x**2 + sin(x) - 1.5") == "3*x**2 + sin(x) - 1.5"
    for text in ("x.real", "eval(x)", "'a'", "__import__", "S(latex(x))", "1 .real"):
        with pytest.raises(Refused):
            safe_expression(text)


def test_where_the_answer_stands():
    assert find_answer("a <answer>1</answer> <answer> 2 </answer> b") == ("2", True)
    assert find_answer(r"so \boxed{3}") == ("3", True)
    assert find_answer(" 4 ") == ("4", True)
    assert find_answer("first\nsecond") == ("first\nsecond", False)
    assert find_answer("") == ("", False)


def test_a_question_without_a_task_has_no_reward(grader: Grader):
    grade = grader.grade(Question(id="q", text="?", answer="1"), "1")
    assert grade.reward is None and "source_dataset" in str(grade.error)
