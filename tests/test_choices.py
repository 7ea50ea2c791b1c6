"""Multiple-choice data sets with the columns of GPQA and MMLU-Pro: letters, shuffled options, their grader."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from ilr_fast import benchmark_sets
from ilr_fast.benchmark_sets import load_benchmark
from ilr_fast.choices import as_question
from ilr_fast.config import AgentConfig, Config, DataConfig, EvaluateConfig
from ilr_fast.data import load_questions
from ilr_fast.errors import UserError
from ilr_fast.evaluate_papers import paper
from ilr_fast.rewards import make_grader

GPQA = [
    {"Record ID": f"rec{n}", "Question": f"Which is {n}?", "Correct Answer": f" {n} ", "Incorrect Answer 1": f"{n + 1}",
     "Incorrect Answer 2": f"{n + 2}", "Incorrect Answer 3": f"{n + 3}", "Subdomain": "Optics"}
    for n in range(60)
]  # fmt: skip
MMLU = [
    {"question_id": n, "question": f"What is {n} + 1?", "options": [str(n + 1), *(str(n - k) for k in range(9))],
     "answer": "A", "answer_index": 0, "cot_content": "", "category": "math", "src": "x"}
    for n in range(60)
]  # fmt: skip
SETS = [("gpqa", "gpqa_diamond.jsonl", GPQA), ("mmlu_pro", "mmlu_pro.jsonl", MMLU)]


def write(folder, name, rows):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(("name", "file", "rows"), SETS)
def test_letters_stand_for_the_options_of_the_data(tmp_path, name, file, rows):
    write(tmp_path, file, rows)
    questions = load_benchmark(name, folder=tmp_path)
    assert questions == load_benchmark(name, folder=tmp_path)
    right = [row.get("Correct Answer", "").strip() or row["options"][0] for row in rows]
    for question, answer in zip(questions, right, strict=True):
        choices = question.metadata["choices"]
        assert choices[question.answer] == answer and f"\n({question.answer}) {answer}" in question.text
        assert question.text.splitlines()[1:] == [f"({letter}) {text}" for letter, text in choices.items()]
    letters = Counter(question.answer for question in questions)
    assert len(letters) == len(questions[0].metadata["choices"]) and max(letters.values()) < 30
    other = load_benchmark(name, folder=tmp_path, seed=1)
    assert [q.answer for q in other] != [q.answer for q in questions]
    assert [q.id for q in other] == [q.id for q in questions]
    assert questions[3].subject in ("Optics", "math") and questions[3].id in ("rec3", "3")


def test_from_the_hub_and_by_path_the_grader_is_choice(tmp_path, monkeypatch):
    asked = []

    def hub_rows(name, split, where):
        asked.append((name, split))
        return ((f"row {n}", row) for n, row in enumerate(GPQA))

    monkeypatch.setattr(benchmark_sets, "hub_rows", hub_rows)
    monkeypatch.delenv("ILR_DATA", raising=False)
    config = Config(agents={"a": AgentConfig(model="m")}, data=DataConfig(train="none", validation="none", test="none"),
                    evaluate=EvaluateConfig(option_seed=5))  # fmt: skip
    found = paper("gpqa", config, limit=4)
    assert asked == [("Idavidrein/gpqa:gpqa_diamond", "train")] and found.config.reward.name == "choice"
    by_path = paper(write(tmp_path, "own.jsonl", GPQA), config)
    assert by_path.config.reward.name == "choice"
    assert [q.answer for q in by_path.questions[:4]] == [q.answer for q in found.questions]


def test_graded_with_reasoning_before_the_box(tmp_path):
    question = load_questions(write(tmp_path, "m.jsonl", MMLU))[0]
    wrong = next(letter for letter in question.metadata["choices"] if letter != question.answer)
    with make_grader("choice") as grader:
        assert grader.grade(question, rf"(X) is out, as 1 > 0. So \boxed{{{question.answer}}}.").reward == 1.1
        assert grader.grade(question, rf"\boxed{{{question.answer}}} or rather \boxed{{{wrong}}}").reward == 0.1
        assert grader.grade(question, r"\boxed{Z}").reward == 0.0


@pytest.mark.parametrize(("row", "message"), [
    ({"question": "?", "options": ["a", "b"], "answer": "C"}, "none of the 2 options"),
    ({"question": "?", "options": [str(n) for n in range(27)], "answer": "A"}, "27 options"),
    ({"Question": "?", "Correct Answer": "a"}, "1 options"),
    ({"question": "?", "options": ["a"], "answer": "A"}, "1 options"),
    ({"question": "?", "options": ["a", None], "answer": "A"}, "an option is null"),
    ({"question": "?", "options": [["a"], "b"], "answer": "A"}, r'an option is \["a"\]'),
    ({"question": "?", "options": ["a", "b"], "answer": "A", "answer_index": 1}, "A and answer_index 1"),
    ({"Question": "?", "Correct Answer": None, "Incorrect Answer 1": "b"}, "an option is null"),
    ({"question": "?", "options": ["a", float("nan")], "answer": "A"}, "an option is NaN"),
    ({"question": "?", "options": ["a", True], "answer": "A"}, "an option is true"),
    ({"question": "?", "options": ["a", "b"], "answer": "", "answer_index": True}, "none of the 2 options"),
    ({"question": "?", "options": ["a", "b"], "answer": "", "answer_index": 0.5}, "none of the 2 options"),
])  # fmt: skip
def test_rows_that_can_not_be_asked(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_questions(write(tmp_path, "bad.jsonl", [row]))


def test_a_letter_alone_says_which_option_is_right():
    row = {"question": "?", "options": ["a", "b"], "answer": "B"}
    for index in (None, float("nan"), 1, 1.0):
        assert as_question({**row, "answer_index": index}, seed=0) == as_question(row, seed=0)
    assert as_question({**row, "answer": None, "answer_index": 1.0}, seed=0) == as_question(row, seed=0)
