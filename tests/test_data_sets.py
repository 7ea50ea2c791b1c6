"""The public data sets, from the folder that ILR_DATA names: every file loads, and MATH's splits hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ilr_fast.benchmark_sets import load_benchmark
from ilr_fast.config import DataConfig
from ilr_fast.data import load_questions, load_splits

FOLDER = Path(os.environ.get("ILR_DATA", "/nonexistent"))
pytestmark = [pytest.mark.data, pytest.mark.skipif(not FOLDER.is_dir(), reason="ILR_DATA names no folder of data sets")]

# GPQA and MMLU-Pro are not among the files: test_choices.py has rows of their columns.
ROWS = {"gsm8k": 1319, "math500": 500, "minerva": 272, "olympiadbench": 671, "aime24": 30, "aime25": 30, "mbpp": 500}


@pytest.mark.parametrize("name", ROWS)
def test_a_benchmark_loads(name):
    questions = load_benchmark(name)
    assert len(questions) == ROWS[name]
    assert all(question.text and question.answer for question in questions)
    assert load_benchmark(name, limit=7) == questions[:7]


def test_mbpp_has_what_its_grader_runs():
    questions = load_benchmark("mbpp")
    numbers = sorted(int(question.id.partition("/")[2]) for question in questions)
    assert numbers == list(range(11, 511))
    assert all(question.metadata["test_list"][0] in question.text for question in questions)


def test_every_file_loads():
    for path in sorted(FOLDER.glob("*.jsonl")):
        assert load_questions(str(path)), path.name


def test_the_papers_splits():
    config = DataConfig(train="${ILR_DATA}/math_train.jsonl", validation="${ILR_DATA}/math_val.jsonl", test="math500")
    splits = load_splits(config, seed=0)
    assert {part: len(questions) for part, questions in splits.items()} == {
        "train": 11000, "validation": 1000, "test": 500,
    }  # fmt: skip
    assert {question.level for question in splits["test"]} == {1, 2, 3, 4, 5}
