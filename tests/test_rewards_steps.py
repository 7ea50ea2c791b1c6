"""The grader of worked solutions: results in order, one line, and what the data must hold."""

import pytest

from ilr_fast.rewards import make_grader
from ilr_fast.tasks import problem

QUESTION = problem("What is 12 + 7 + 30 + 1?", "50", solution="12 + 7 = 19, 19 + 30 = 49, 49 + 1 = 50")


@pytest.mark.parametrize(
    ("text", "correct", "share"),
    [
        (" 12 + 7 = 19, 19 + 30 = 49, 49 + 1 = 50\n", True, 1.0),
        ("12 + 7 = 19 + 30 = 49 + 1 = 50", True, 1.0),
        ("12 + 7 = 19.0, 19 + 30 = 049, 49 + 1 = 50.", True, 1.0),  # equal numbers, written in another way
        ("12 + 7 = 19, 19 + 30 = 48, 48 + 1 = 50", True, 1 / 3),  # a mistake that another one made good
        ("12 + 7 = 19, 19 + 30 = 49, 49 + 1 = 51", False, 2 / 3),
        ("12 + 7 = 18, 18 + 30 = 48, 48 + 1 = 49", False, 0.0),
        ("12 + 7 = 1, 19 + 30 = 49, 49 + 1 = 50", True, 0.0),
        ("50", True, 0.0),
        ("12 + 7 = 19, so it is 19. Then 19 + 30 = 49, 49 + 1 = 50. Check: what is 12 + 7?", True, 1.0),
        ("12 + 7 = 19, 19 + 30 = 49, 49 + 1 = 50, 50 + 1 = 51", False, 1.0),  # went on
        ("12 + 7 = 19\n19 + 30 = 49, 49 + 1 = 50", False, 1 / 3),  # the first line counts
        ("", False, 0.0),
        ("= 19" * 100_000, False, 1 / 3),
    ],
)
def test_results_count_in_order_up_to_the_first_mistake(text, correct, share):
    with make_grader("steps", format_weight=1.0) as grader:
        grade = grader.grade(QUESTION, text)
    assert (grade.correct, grade.formatted) == (correct, correct and share == 1)
    assert grade.reward == pytest.approx(correct + share) and grade.error is None


def test_the_weight_of_the_steps_is_the_config_s():
    graded = [make_grader("steps", format_weight=w).grade(QUESTION, "12 + 7 = 19, 19 + 30 = 0") for w in (0.0, 0.3)]
    assert [g.reward for g in graded] == [0.0, pytest.approx(0.1)]


@pytest.mark.parametrize("question", [problem("What?", "many", solution="1 + 1 = 2"), problem("What is 1 + 1?", "2")])
def test_data_without_a_number_or_results_is_told(question):
    grade = make_grader("steps").grade(question, "1 + 1 = 2")
    assert grade.reward is None and "solution show results" in grade.error
