"""Difficulty: estimators by hand, windows, rankings in all kinds of prose, the cache cut off and damaged."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter

import pytest
from chat_cases import byte_level

from ilr_fast.ability import ability, success_probability
from ilr_fast.chat import ChatFormat
from ilr_fast.config import DifficultyConfig
from ilr_fast.difficulty import from_levels, from_pass_rates, from_rankings, from_share, spearman
from ilr_fast.errors import UserError
from ilr_fast.protocols.templates import load_prompts
from ilr_fast.ranking import parse_ranking, self_ranking, windows
from ilr_fast.ranking_cache import RankingCache, data_fingerprint
from ilr_fast.rollout import Seat
from ilr_fast.types import Generation, Question

CHAT = ChatFormat(byte_level(["<eos>"], eos_token="<eos>"), "plain")
PROMPTS = load_prompts("short", "number")
QUESTIONS = [Question(f"q{n}", f"count {n} sheep", str(n), level=1 + n % 5) for n in range(12)]
CONFIG = DifficultyConfig(window=5, repeats=3)


def test_the_median_question_has_difficulty_0():
    difficulty = from_rankings(list("abcde"), [list("abcde")])
    assert difficulty.values["c"] == 0
    assert difficulty.values["a"] == pytest.approx(math.log(0.1 / 0.9) / 1.7)  # p = (1 − ½)/5
    assert difficulty.values["e"] == pytest.approx(-difficulty.values["a"])
    assert sorted(difficulty.values, key=difficulty.values.get) == list("abcde")


def test_an_agent_competes_where_its_accuracy_reaches_p():
    for p, competes in ((0.3, True), (0.29, True), (0.31, False)):
        assert (success_probability(ability(30, 100), from_share(p)) >= 0.5) == competes


def test_rankings_are_averaged_and_invalid_ones_left_out():
    difficulty = from_rankings(list("abcd"), [["a", "b", "c"], None, ["b", "a"]])
    assert difficulty.values["a"] == pytest.approx(from_share((1 / 6 + 3 / 4) / 2))
    assert difficulty.values["b"] == pytest.approx(from_share((3 / 6 + 1 / 4) / 2))
    assert difficulty.values["d"] == 0 and difficulty.unknown == ("d",)
    assert (difficulty.windows, difficulty.invalid_windows) == (3, 1)


def test_pass_rate_by_hand():
    values = from_pass_rates({"easy": 7, "half": 4, "never": 0}, {"easy": 8, "half": 8, "never": 8}).values
    assert values["half"] == 0
    assert values["easy"] == pytest.approx(math.log((1.5 / 9) / (7.5 / 9)) / 1.7)
    assert values["never"] == pytest.approx(math.log(8.5 / 0.5) / 1.7)


def test_level_by_hand():
    values = from_levels(QUESTIONS, 5).values
    assert values["q2"] == 0 and values["q0"] == pytest.approx(math.log(0.1 / 0.9) / 1.7)
    with pytest.raises(UserError, match="question 'q4' has level 5, outside 1 to 4"):
        from_levels(QUESTIONS, 4)
    with pytest.raises(UserError, match="question 'x' has no level"):
        from_levels([Question("x", "?", "1")], 5)


def test_spearman_by_hand():
    rates = {"a": 0.9, "b": 0.5, "c": 0.1}
    assert spearman({"a": -1, "b": 0, "c": 1}, rates) == pytest.approx(1)
    assert spearman({"a": 1, "b": 0, "c": -1, "unknown": 3}, rates) == pytest.approx(-1)
    assert spearman({"a": 0, "b": 1, "c": -1}, rates) == pytest.approx(-0.5)  # 1 − 6·(1+1+4)/24
    assert spearman({"a": 0, "b": 0, "c": 1}, rates) == pytest.approx(math.sqrt(3) / 2)  # ranks 1.5, 1.5, 3
    assert spearman({"a": 0, "b": 0, "c": 0}, rates) is None and spearman({"a": 1}, rates) is None


@pytest.mark.parametrize("count", [5, 6, 12, 13, 23])
def test_windows_hold_every_question_as_often_as_asked(count):
    ids = [f"q{n}" for n in range(count)]
    made = windows(ids, 5, 3, seed=1)
    assert {len(set(w)) for w in made} == {5} and len(made) == 3 * -(-count // 5)
    seen = Counter(q for w in made for q in w)
    assert set(seen) == set(ids) and min(seen.values()) >= 3 and sum(seen.values()) == 5 * len(made)
    assert made == windows(ids, 5, 3, seed=1) != windows(ids, 5, 3, seed=2)


def test_windows_of_few_questions():
    assert {frozenset(w) for w in windows(["a", "b"], 5, 3, 0)} == {frozenset("ab")}
    assert windows(["a"], 5, 3, 0) == []


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("3, 1, 2", (3, 1, 2)),
        ("I think: 3, 1, 2…", (3, 1, 2)),
        ("[3] > [1] > [2]", (3, 1, 2)),
        ("[3, 1, 2]", (3, 1, 2)),
        ("3\n1\n2", (3, 1, 2)),
        ("- 3\n- 1\n- 2", (3, 1, 2)),
        ("**3** → **1** → **2**", (3, 1, 2)),
        ("Question 3, then Question 1, and finally question 2.", (3, 1, 2)),
        ("Q3 < Q1 < Q2", (3, 1, 2)),
        ("1. Question 3\n2. Question 1\n3. Question 2", (3, 1, 2)),
        ("Easiest first:\n1) [3] since it is a sum of 12 and 7\n2) [1] has 3 digits\n3) [2]", (3, 1, 2)),
        ("The easiest is 3. Problem 1 is in the middle and 2 is the hardest.", (3, 1, 2)),
        ("Questions 1, 2 and 3 are ordered: 3, 1, 2", (3, 1, 2)),
        ("<think>maybe 1, 2, 3 or 2, 1, 3</think>3, 2, 1", (3, 2, 1)),
        ("3 (two digits), 1 (three digits), 2 (a carry)", (3, 1, 2)),
        ("", None),
        ("3, 1", None),
        ("312", None),
        ("1, 1, 1", None),
        ("4, 2, 1", None),
        ("1, 2, 3, 1, 2", None),
        ("3 is easy, 1 is harder than 3, then 2", None),
        ("1. 12 + 7\n2. 3 * 4\n3. 10 + 1", None),
        ("9" * 5000, None),
    ],
)
def test_rankings_in_prose(text, order):
    assert parse_ranking(text, 3) == order


def test_hostile_rankings_are_read_quickly():
    start = time.perf_counter()
    spaces, marks = "1" + " " * 100_000, "*" * 50_000
    for text in (spaces, marks, "1, 2 " * 20_000, "1." * 20_000, "1\n " * 20_000, "Question " * 10_000):
        parse_ranking(text, 5)
    assert time.perf_counter() - start < 5


class Ranker:
    """Orders by the number of sheep, in a sentence; `refuses` says at which calls it talks of something else."""

    max_context = 4000

    def __init__(self, refuses=lambda call: False):
        self.refuses, self.samplings = refuses, []

    async def generate(self, tokens, sampling):
        self.samplings.append(sampling)
        refused = self.refuses(len(self.samplings))
        await asyncio.sleep(0)
        if refused:
            return Generation((), (), "stop", "They are all lovely.")
        rows = [line.split() for line in CHAT.text(tokens).replace("Question: ", "").split("\n") if "sheep" in line]
        order = sorted(rows, key=lambda row: int(row[2]))
        return Generation((), (), "stop", "I would say " + ", then ".join(row[0].rstrip(".") for row in order))


def rank(engine, questions=QUESTIONS, **keys):
    return asyncio.run(self_ranking(questions, Seat(engine, CHAT), PROMPTS, CONFIG, seed=3, **keys))


def test_self_ranking_finds_the_order():
    ready = []
    engine = Ranker()
    difficulty = rank(engine, on_done=ready.append)
    assert not difficulty.unknown and difficulty.invalid_windows == 0 and difficulty.windows == 9 == max(ready)
    assert spearman(difficulty.values, {q.id: -int(q.answer) for q in QUESTIONS}) > 0.9
    assert {s.temperature for s in engine.samplings} == {0.0} and len({s.seed for s in engine.samplings}) == 9


def test_an_unreadable_ranking_is_asked_for_once_more():
    engine = Ranker(refuses=lambda call: call <= 9)  # every window's first answer
    assert rank(engine).invalid_windows == 0
    assert [s.temperature for s in engine.samplings] == [0.0] * 9 + [1.0] * 9
    engine = Ranker(refuses=lambda call: True)
    difficulty = rank(engine)
    assert len(engine.samplings) == 18 and difficulty.invalid_windows == 9
    assert set(difficulty.values.values()) == {0.0} and len(difficulty.unknown) == 12


KEY = {"model": "m", "data": data_fingerprint(QUESTIONS), "window": 5, "repeats": 3, "seed": 3}


def test_the_cache_asks_only_for_the_rest(tmp_path):
    whole = rank(Ranker(), cache=RankingCache.open(tmp_path, KEY))
    path = RankingCache.open(tmp_path, KEY).path
    content = path.read_bytes()
    again = Ranker()
    assert rank(again, cache=RankingCache.open(tmp_path, KEY)) == whole and again.samplings == []
    lines = content.splitlines(keepends=True)
    for end in (len(b"".join(lines[:5])) + 7, len(b"".join(lines[:5])), len(lines[0]), len(content) - 1):
        path.write_bytes(content[:end])  # killed in the middle of a line, between lines, before the first, at the last
        again = Ranker()
        assert rank(again, cache=RankingCache.open(tmp_path, KEY)) == whole
        assert len(again.samplings) == 9 - (content[:end].count(b"\n") - 1)
        assert sorted(path.read_bytes().splitlines()) == sorted(content.splitlines())


def test_unreadable_windows_are_cached_too(tmp_path):
    rank(Ranker(refuses=lambda call: True), cache=RankingCache.open(tmp_path, KEY))
    again = Ranker()
    assert rank(again, cache=RankingCache.open(tmp_path, KEY)).invalid_windows == 9 and again.samplings == []


def test_windows_that_the_engine_failed_on_are_asked_for_again(tmp_path):
    class Failing(Ranker):
        async def generate(self, tokens, sampling):
            return Generation((), (), "error", "", "out of memory")

    assert rank(Failing(), cache=RankingCache.open(tmp_path, KEY)).invalid_windows == 9
    again = Ranker()
    assert rank(again, cache=RankingCache.open(tmp_path, KEY)).invalid_windows == 0 and len(again.samplings) == 9


def test_another_key_is_another_file(tmp_path):
    changes = ({}, {"model": "n"}, {"seed": 4}, {"window": 4})
    paths = {RankingCache.open(tmp_path, KEY | change).path for change in changes}
    assert len(paths) == 4
    assert data_fingerprint(QUESTIONS) != data_fingerprint(QUESTIONS[1:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.replace(b"q1", b"q2", 1),
        lambda c: b"",
        lambda c: b"\x00" * len(c),
        lambda c: c[: len(c) // 2] + b"\n" + c[len(c) // 2 :],
        lambda c: c.split(b"\n", 1)[1],
    ],
)
def test_a_damaged_cache_is_refused_with_its_name(tmp_path, damage):
    cache = RankingCache.open(tmp_path, KEY)
    rank(Ranker(), cache=cache)
    cache.path.write_bytes(damage(cache.path.read_bytes()))
    with pytest.raises(UserError, match="damaged.*\n.*delete the file") as caught:
        rank(Ranker(), cache=RankingCache.open(tmp_path, KEY))
    assert str(cache.path) in caught.value.where


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        RankingCache.open(tmp_path / "file" / "below", KEY)
