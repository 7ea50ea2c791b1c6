"""Rows into questions with errors that name the line; splits that share none; the order of training questions."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace

import pytest

from ilr_fast.benchmark_sets import BENCHMARKS, load_benchmark
from ilr_fast.config import DataConfig
from ilr_fast.data import QuestionStream, check_disjoint, load_questions, load_splits
from ilr_fast.errors import UserError
from ilr_fast.types import Question


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_a_row_becomes_a_question(tmp_path):
    row = {"id": "a", "question": " 1 + 1? ", "answer": 2, "level": "Level 3", "subject": "sums", "license": "MIT"}
    (question,) = load_questions(write(tmp_path / "q.jsonl", row, ""))
    assert question == Question("a", "1 + 1?", "2", level=3, subject="sums", metadata={"license": "MIT"})


def test_other_columns_and_missing_ids(tmp_path):
    path = write(tmp_path / "q.jsonl", {"problem": "x?", "final": ["1", 2]}, {"problem": "y?", "final": 0})
    questions = load_questions(path, question_key="problem", answer_key="final")
    assert [(q.id, q.text, q.answer) for q in questions] == [("q/0", "x?", "1, 2"), ("q/1", "y?", "0")]
    assert load_questions(path, question_key="problem", answer_key="final", limit=1) == questions[:1]


def test_gsm8k_answers_are_parted(tmp_path):
    path = write(tmp_path / "q.jsonl", {"question": "x?", "answer": "2 * 9 = 18\n#### 18"})
    (question,) = load_questions(path)
    assert (question.answer, question.solution) == ("18", "2 * 9 = 18")


@pytest.mark.parametrize(("level", "expected"), [("Level 5", 5), (2, 2), ("4", 4), ("Level ?", None), (None, None)])
def test_levels(tmp_path, level, expected):
    path = write(tmp_path / "q.jsonl", {"question": "x?", "answer": "1", "level": level})
    assert load_questions(path)[0].level == expected


def test_programs_see_their_tests(tmp_path):
    tests = ["assert f(1) == 2", "assert f(2) == 3"]
    path = write(tmp_path / "q.jsonl", {"question": "Add one.", "answer": "def f…", "test_list": tests})
    (question,) = load_questions(path)
    assert question.text == "Add one.\nYour program must pass these tests:\nassert f(1) == 2\nassert f(2) == 3"
    assert question.metadata["test_list"] == tests


GOOD = {"id": "a", "question": "x?", "answer": "1"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "x?", ', r"q\.jsonl:2: broken JSON"),
        ('["x?"]', "q.jsonl:2: a list instead of an object"),
        ({"answer": "1"}, r"q\.jsonl:2: the row has no 'question' \(but answer\)"),
        ({"question": "x?", "reply": "1"}, r"no 'answer' \(but question, reply\)\n.*data.answer_key"),
        ({"question": "  ", "answer": "1"}, "q.jsonl:2: 'question' is empty"),
        ({"question": "x?", "answer": ""}, "q.jsonl:2: 'answer' is empty"),
        ({"question": "x?", "answer": None}, "'answer' is null"),
        ({"question": "x?", "answer": True}, "'answer' is a bool"),
        ({"question": "x?", "answer": "1", "level": 0}, "levels count from 1"),
        (GOOD, r"q\.jsonl:2: the id 'a' stands at .*q\.jsonl:1 already"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_questions(write(tmp_path / "q.jsonl", GOOD, row))


def test_bad_files_are_named(tmp_path, monkeypatch):
    write(tmp_path / "problems.jsonl", GOOD)
    with pytest.raises(UserError, match="no file .*problem.jsonl\n.*did you mean 'problems.jsonl'") as caught:
        load_questions(str(tmp_path / "problem.jsonl"), where="data.train = problem.jsonl")
    assert caught.value.where == "data.train = problem.jsonl"
    with pytest.raises(UserError, match="has no rows"):
        load_questions(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(UserError, match="is a folder"):
        load_questions(str(tmp_path))
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_questions(str(tmp_path / "latin.jsonl"))
    monkeypatch.delenv("ILR_DATA", raising=False)
    with pytest.raises(UserError, match="variable ILR_DATA is not set"):
        load_questions("${ILR_DATA}/x.jsonl")
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        load_questions("gsm8")


def test_a_split_of_a_file(tmp_path):
    rows = [GOOD | {"id": str(i), "split": "test" if i % 2 else "train"} for i in range(5)]
    path = write(tmp_path / "q.jsonl", *rows)
    assert [q.id for q in load_questions(f"{path}#test")] == ["1", "3"]
    with pytest.raises(UserError, match="no rows of the split 'dev'"):
        load_questions(f"{path}#dev")


@pytest.fixture
def hub(monkeypatch):
    """The package datasets, with one data set on its hub."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name != "me/sums":
            raise ConnectionError("Couldn't reach the Hub\nlong story")
        return [{"question": f"{split} {n}?", "answer": str(n)} for n in range(3)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_hub_data_set(hub):
    assert [q.text for q in load_questions("me/sums:main#dev")] == ["dev 0?", "dev 1?", "dev 2?"]
    assert [q.id for q in load_questions("me/sums", split="train", limit=2)] == ["me/sums/0", "me/sums/1"]
    assert hub == [("me/sums", "main", "dev"), ("me/sums", None, "train")]
    with pytest.raises(UserError, match="can't be loaded from the Hub: Couldn't reach the Hub\n") as caught:
        load_questions("me/nowhere", where="data.test = me/nowhere")
    assert caught.value.where == "data.test = me/nowhere"
    with pytest.raises(UserError, match=r"me/sums train row 0: the row has no 'problem'"):
        load_questions("me/sums#train", question_key="problem")


def test_the_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ilr-fast\[hub\]'"):
        load_questions("openai/gsm8k:main")


def q(number, text=None, canonical=None):
    return Question(str(number), text or f"question {number}", "1", canonical=canonical)


@pytest.mark.parametrize(
    ("train", "test", "kind"),
    [
        (q(1), q(1, "another"), "id"),
        (q(1, "What  is\n1 + 1?"), q(2, "what is 1 + 1?"), "text"),
        (q(1, "1 + 2?", "sum 1 2"), q(2, "2 + 1?", "sum 1 2"), "canonical form"),
    ],
)
def test_a_shared_problem_names_both_rows(train, test, kind):
    with pytest.raises(UserError, match=f"'{test.id}' of test and '{train.id}' of train have the same {kind}"):
        check_disjoint({"train": [q(7), train], "test": [q(8), test]})
    check_disjoint({"train": [train, train], "test": [q(8)]})


def test_splits_of_a_config(tmp_path):
    train = write(tmp_path / "train.jsonl", *({"problem": f"t{n}?", "answer": 1} for n in range(4)))
    config = DataConfig(
        train=train, validation="task:sums", test="task:sums", train_size=3, validation_size=10, test_size=20,
        task_options={"high": 30}, question_key="problem",
    )  # fmt: skip
    splits = load_splits(config, seed=1)
    assert {part: len(questions) for part, questions in splits.items()} == {"train": 3, "validation": 10, "test": 20}
    assert splits["train"][0].text == "t0?"
    held_out = write(tmp_path / "held_out.jsonl", {"problem": "T0?", "answer": 1})
    with pytest.raises(UserError, match="of validation and 'train/0' of train have the same text") as caught:
        load_splits(DataConfig(train=train, validation=held_out, test="task:sums", question_key="problem"), seed=1)
    assert caught.value.where == "data.validation"
    with pytest.raises(UserError) as caught:
        load_splits(DataConfig(train="nowhere.jsonl", validation="task:sums", test="task:sums"), seed=1)
    assert caught.value.where == "data.train = nowhere.jsonl"


def test_a_source_of_several_parts_is_dealt_out(tmp_path):
    rows = write(tmp_path / "rows.jsonl", *({"question": f"t{n}?", "answer": 1} for n in range(20)))
    config = DataConfig(train=rows, validation=rows, test=rows, validation_size=3, test_size=4)
    splits = load_splits(config, seed=1)
    assert {part: len(questions) for part, questions in splits.items()} == {"train": 13, "validation": 3, "test": 4}
    assert len({question.id for questions in splits.values() for question in questions}) == 20
    assert load_splits(config, seed=2) == splits  # a resumed or repeated run holds out the same problems
    smaller = load_splits(replace(config, train_size=5), seed=1)
    assert smaller["test"] == splits["test"] and smaller["train"] == splits["train"][:5]
    with pytest.raises(UserError, match="nothing says how many of its rows validation takes") as caught:
        load_splits(replace(config, validation_size=None), seed=1)
    assert caught.value.where == "data.validation_size"
    with pytest.raises(UserError, match="the held-out parts take all rows"):
        load_splits(replace(config, validation_size=16), seed=1)


def test_a_task_named_three_times_is_drawn_once():
    task = "task:sums"
    config = DataConfig(
        train=task, validation=task, test=task, task_options={"high": 20},
        train_size=100, validation_size=58, test_size=52,
    )  # fmt: skip
    splits = load_splits(config, seed=3)
    assert len({question.canonical for part in splits.values() for question in part}) == 210
    assert load_questions(task, limit=52, seed=3, task_options={"high": 20}) == splits["test"]


def test_the_stream_needs_only_the_step():
    stream = QuestionStream([q(n) for n in range(10)], seed=4)
    steps = [[question.id for question in stream.questions_at(step, 3)] for step in range(1, 41)]
    again = QuestionStream([q(n) for n in range(10)], seed=4)
    assert [question.id for question in again.questions_at(17, 3)] == steps[16]
    assert all(len(set(step)) == 3 for step in steps)
    for epoch in range(0, 39, 3):
        seen = [number for step in steps[epoch : epoch + 3] for number in step]
        assert len(set(seen)) == 9  # no question twice in an epoch
    assert steps[0:3] != steps[3:6]
    assert {number for step in steps for number in step} == {str(n) for n in range(10)}  # what is skipped changes
    other = QuestionStream([q(n) for n in range(10)], seed=5)
    assert other.questions_at(1, 10) != stream.questions_at(1, 10)


def test_a_step_larger_than_the_data():
    with pytest.raises(UserError, match="a step takes 11 questions and there are 10") as caught:
        QuestionStream([q(n) for n in range(10)], seed=4).questions_at(1, 11)
    assert caught.value.where == "rollout.questions"


def test_benchmarks_from_a_folder_or_the_hub(tmp_path, monkeypatch, hub):
    monkeypatch.delenv("ILR_DATA", raising=False)
    rows = [GOOD | {"id": f"mbpp/{n}", "split": split} for n, split in ((3, "train"), (11, "test"))]
    write(tmp_path / "mbpp.jsonl", *rows)
    assert [question.id for question in load_benchmark("mbpp", folder=tmp_path)] == ["mbpp/11"]
    write(tmp_path / "olympiadbench.jsonl", *(GOOD | {"id": f"olympiadbench/{n}"} for n in (2606, 2607)))
    monkeypatch.setenv("ILR_DATA", str(tmp_path))
    assert [question.id for question in load_questions("olympiadbench")] == ["olympiadbench/2606"]
    with pytest.raises(UserError, match="no file .*gsm8k_test.jsonl\n  → put gsm8k_test.jsonl there, or leave .*DATA"):
        load_benchmark("gsm8k")
    monkeypatch.delenv("ILR_DATA")
    with pytest.raises(UserError, match="benchmark gsm8k: openai/gsm8k:main"):
        load_benchmark("gsm8k")
    assert hub == [("openai/gsm8k", "main", "test")]
    with pytest.raises(UserError, match="did you mean 'math500'"):
        load_benchmark("math50")
    assert {benchmark.reward for benchmark in BENCHMARKS.values()} == {"math", "code", "choice"}
