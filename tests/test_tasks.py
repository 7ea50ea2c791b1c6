"""Generated problems: what they say, that splits share none in any order, and what is refused."""

from __future__ import annotations

import itertools
import re
import sys

import pytest

from ilr_fast import tasks
from ilr_fast.errors import UserError
from ilr_fast.rewards.number import read_number
from ilr_fast.tasks import largest, problem, smallest, splits, sums, task_reward


def first(generator, count=50):
    return list(itertools.islice(generator, count))


def numbers_of(question):
    return [int(n) for n in re.findall(r"\d+", question.text)]


def test_largest_says_what_it_means():
    for question in first(largest(3, numbers=4, low=10, high=40)):
        numbers = numbers_of(question)
        assert question.text.startswith("Which number is the largest: ")
        assert len(set(numbers)) == 4 and all(10 <= n <= 40 for n in numbers)
        assert question.answer == question.solution == str(max(numbers))


def test_largest_of_several_counts_has_levels():
    questions = first(largest(3, numbers=2, most=4), 200)
    assert {len(numbers_of(q)) for q in questions} == {2, 3, 4}
    assert all(q.level == len(numbers_of(q)) - 1 and q.answer == str(max(numbers_of(q))) for q in questions)
    assert first(largest(3, numbers=2))[0].level is None


def test_smallest_is_largest_the_other_way_round():
    for question in first(smallest(3, numbers=2, most=3)):
        assert question.text.startswith("Which number is the smallest: ")
        assert question.answer == question.solution == str(min(numbers_of(question))) and question.level in (1, 2)
    assert {q.canonical for q in first(smallest(3))}.isdisjoint(q.canonical for q in first(largest(3)))
    assert [task_reward(t) for t in ("smallest", "reasoning_gym:chain_sum", "mine:f")] == ["number", "task", None]


def test_sums_say_what_they_mean():
    for question in first(sums(3, low=5, high=9)):
        a, b = numbers_of(question)
        assert question.text == f"What is {a} + {b}?" and question.answer == str(a + b)
        assert 5 <= a <= 9 and 5 <= b <= 9
    longer = next(sums(3, low=2, high=2, numbers=4))
    assert longer.text == "What is 2 + 2 + 2 + 2?" and longer.answer == "8"
    assert longer.solution == "2 + 2 = 4, 4 + 2 = 6, 6 + 2 = 8" and read_number(longer.solution) == 8
    spoken = next(sums(3, low=2, high=2, numbers=3, words=True))
    assert spoken.solution == (
        "Step 1 of 2: we take what we have so far, look for the next number that we did not use yet, "
        "and add the two together, so 2 + 2 = 4. "
        "Step 2 of 2: we take what we have so far, look for the next number that we did not use yet, "
        "and add the two together, so 4 + 2 = 6."
    )
    assert problem("What?", "1").solution == "1"


def test_the_order_of_a_problem_does_not_count():
    by_pair = {tuple(numbers_of(q)): q.canonical for q in first(sums(0, low=1, high=4), 300)}
    assert len(by_pair) == 16 and by_pair[1, 3] == by_pair[3, 1] != by_pair[2, 2]
    assert problem("What is 12 + 7?", "19").canonical == problem("What is 7 + 12?", "19").canonical
    assert problem("What is 12 + 7?", "19").canonical != problem("What is 12 + 8?", "20").canonical


def test_splits_are_whole_disjoint_and_repeatable():
    sizes = {"train": 90, "validation": 60, "test": 50}
    made = splits("sums", sizes, seed=1, options={"low": 1, "high": 20})  # 210 problems, 200 of them asked for
    assert list(made) == list(sizes) and {k: len(v) for k, v in made.items()} == sizes
    pairs = [tuple(sorted(numbers_of(q))) for split in made.values() for q in split]
    assert len(set(pairs)) == 200
    assert len({q.id for split in made.values() for q in split}) == 200
    assert made["test"][7].id == "sums/test/00007"
    assert made == splits("sums", sizes, seed=1, options={"low": 1, "high": 20})
    other = splits("sums", sizes, seed=2, options={"low": 1, "high": 20})
    assert [q.text for q in other["test"]] != [q.text for q in made["test"]]


def test_the_test_problems_do_not_depend_on_the_other_sizes():
    small = splits("largest", {"train": 10, "test": 30}, seed=5)
    large = splits("largest", {"train": 500, "validation": 100, "test": 30}, seed=5)
    assert small["test"] == large["test"]


def test_a_test_set_of_more_than_a_quarter_is_refused():
    options = {"low": 1, "high": 20}
    assert splits("sums", {"test": 52}, 0, options)
    with pytest.raises(UserError, match="53 test problems of about 210") as caught:
        splits("sums", {"test": 53}, 0, options)
    assert "data.test_size = 52" in caught.value.remedy
    with pytest.raises(UserError, match="only about 210 different problems"):
        splits("sums", {"train": 200, "test": 20}, 0, options)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("largst", {}, "no task is called 'largst'"),
        ("largest", {"number": 3}, "no option 'number'"),
        ("largest", {"numbers": 1}, "2 or more different numbers"),
        ("largest", {"low": "a"}, "options don't fit"),
        ("sums", {"low": 9, "high": 3}, "low = 9 lies above"),
        ("sums", {"numbers": 1}, "give 2 or more"),
        ("no_such_module:task", {}, "can't import"),
        ("math:no_such_function", {}, "has no .no_such_function"),
    ],
)
def test_a_wrong_task_is_refused(task, options, message):
    with pytest.raises(UserError, match=message):
        splits(task, {"test": 5}, 0, options)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_problems.py").write_text(
        "import random\n"
        "from ilr_fast.tasks import problem\n"
        "def doubles(seed, *, high=500):\n"
        "    rng = random.Random(seed)\n"
        "    while True:\n"
        "        n = rng.randint(1, high)\n"
        "        yield problem(f'What is twice {n}?', str(2 * n))\n"
        "def texts(seed):\n"
        "    yield 'What is twice 3?'\n"
        "def nothing(seed):\n"
        "    yield from ()\n"
        "def three(seed):\n"
        "    yield from (problem(f'{n}?', str(n)) for n in range(3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_problems", None)


def test_a_task_of_ones_own(own_module):
    made = splits("my_problems:doubles", {"train": 20, "test": 5}, 0, {"high": 60})
    assert all(int(q.answer) == 2 * numbers_of(q)[0] for split in made.values() for q in split)
    assert made["train"][0].id == "my_problems:doubles/train/00000"
    with pytest.raises(UserError, match="no option 'hihg'.*\n.*did you mean 'high'"):
        splits("my_problems:doubles", {"test": 5}, 0, {"hihg": 60})
    with pytest.raises(UserError, match="yields str"):
        splits("my_problems:texts", {"test": 5}, 0)
    with pytest.raises(UserError, match="yields NoneType"):
        splits("my_problems:nothing", {"test": 5}, 0)
    with pytest.raises(UserError, match="only about 3 different"):
        splits("my_problems:three", {"test": 5}, 0)


def test_reasoning_gym_problems_keep_their_entry_for_the_scorer():
    gym = pytest.importorskip("reasoning_gym")
    made = splits("reasoning_gym:chain_sum", {"train": 600, "test": 20}, 0, {"max_terms": 3})
    for question in made["train"][:5] + made["train"][-5:]:
        entry = question.metadata["entry"]
        assert entry["question"] == question.text and entry["metadata"]["source_dataset"] == "chain_sum"
        assert gym.get_score_answer_fn("chain_sum")(question.answer, entry) == 1.0
    assert len({q.canonical for split in made.values() for q in split}) == 620
    with pytest.raises(UserError, match="did you mean 'chain_sum'"):
        splits("reasoning_gym:chain_sums", {"test": 5}, 0)
    with pytest.raises(UserError, match="max_terms must be"):
        splits("reasoning_gym:chain_sum", {"test": 5}, 0, {"max_terms": 1})


def test_reasoning_gym_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'ilr-fast\[tasks\]'"):
        splits("reasoning_gym:chain_sum", {"test": 5}, 0)


def test_sub_seeds_fit_reasoning_gym():
    seeds = [tasks._sub_seed(seed, split) for seed in range(200) for split in ("train", "validation", "test")]
    assert len(set(seeds)) == 600 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_module_with_an_error_is_the_users_mistake(tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("def doubles(seed):\n    return (\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UserError, match="can't import 'half_written' \\(SyntaxError"):
        splits("half_written:doubles", {"test": 5}, 0)


def test_reasoning_gym_levels_are_drawn_evenly_and_noted():
    pytest.importorskip("reasoning_gym")
    levels = [{"min_terms": n, "max_terms": n} for n in (2, 4)]
    made = splits("reasoning_gym:chain_sum", {"train": 60}, 3, {"levels": levels, "max_digits": 2})["train"]
    by_level = {level: [q for q in made if q.level == level] for level in (1, 2)}
    assert min(map(len, by_level.values())) > 20
    for level, terms in ((1, 2), (2, 4)):
        assert all(len(re.findall(r"\d+", q.text)) == terms for q in by_level[level])
        assert all(max(map(int, re.findall(r"\d+", q.text))) < 100 for q in by_level[level])
