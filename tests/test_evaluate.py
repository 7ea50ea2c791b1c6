"""Evaluation over an engine that knows some answers: accuracy, intervals, outcomes on disk, few-shot bases."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from chat_cases import byte_level

from ilr_fast.chat import ChatFormat
from ilr_fast.config import AgentConfig, Config, CreditConfig, EvaluateConfig, PromptConfig, RewardConfig, RolloutConfig
from ilr_fast.errors import UserError
from ilr_fast.evaluate import evaluate_agents, evaluate_base, few_shot_examples, method_of, record
from ilr_fast.protocols.templates import load_prompts
from ilr_fast.rewards import make_grader
from ilr_fast.rollout import Seat
from ilr_fast.statistics import paired_difference, wilson
from ilr_fast.types import Generation, Question

CHAT = ChatFormat(byte_level(["<eos>"], eos_token="<eos>"), "plain")
CONFIG = Config(
    seed=5,
    prompts=PromptConfig(file="short"),
    reward=RewardConfig(name="number"),
    rollout=RolloutConfig(max_tokens=dict(default=8), peer_tokens=8),
    evaluate=EvaluateConfig(few_shot=[1, 3]),
)
QUESTIONS = [Question(f"q{n}", f"What is {n} + 7?", str(n + 7)) for n in range(10)]
TRAIN = [Question(f"t{n}", f"What is {n} + 3?", str(n + 3)) for n in range(4)]


class Knower:
    """Answers the first `knows` questions rightly (with one more for each worked example), the others with 0."""

    max_context = 10_000

    def __init__(self, knows, fails="no such text", lucky=None, turns=1):
        self.knows, self.fails, self.lucky, self.turns, self.requests = knows, fails, lucky, turns, []

    async def generate(self, tokens, sampling):
        self.requests.append(sampling)
        prompt = CHAT.text(tokens)
        if self.fails in prompt:
            return Generation((), (), "error", "", "out of luck")
        n = int(prompt.rsplit("What is ", 1)[1].split()[0])
        right = n < self.knows + prompt.count("+ 3?") and prompt.count("+ 7?") >= self.turns
        if self.lucky is not None:
            right = len(self.requests) % self.lucky == 0
        text = f" {n + 7 if right else 0}"
        answer = CHAT.tokens(text + "\n")
        return Generation(tuple(answer), tuple(-1.0 for _ in answer), "stop", text)

    def weights_changed(self):
        pass


def measure(seats, **options):
    seats = {name: Seat(engine, CHAT) for name, engine in seats.items()}
    with make_grader("number") as grader:
        return evaluate_agents(seats, QUESTIONS, grader, **{
            "config": CONFIG, "benchmark": "test", "method": "ilr", "seed": 5, "checkpoint": "step_000010", **options})


def test_each_agent_alone_and_greedy():
    engines = {"a": Knower(3), "b": Knower(8)}
    found = measure(engines)
    a, b = found.rows
    assert (a["agent"], a["n"], a["correct"], a["accuracy"]) == ("a", 10, 3, 0.3)
    assert b["accuracy"] == 0.8 and a["ci95"] == wilson(3, 10)
    for key, value in {"method": "ilr", "benchmark": "test", "mode": "single", "samples": 1, "seed": 5, "failed": 0,
                       "checkpoint": "step_000010", "temperature": 0.0, "examples": None}.items():  # fmt: skip
        assert a[key] == value, key
    said = [CHAT.tokens(f" {n + 7 if n < 3 else 0}\n") for n in range(10)]
    assert a["tokens_mean"] == pytest.approx(sum(map(len, said)) / 10)
    assert all(s.temperature == 0 for s in engines["a"].requests) and len(engines["a"].requests) == 10
    assert found.correct("b") == {f"q{n}": [n < 8] for n in range(10)}
    assert paired_difference(found.correct("b"), found.correct("a")).difference == 0.5


def test_several_samples_have_a_temperature_and_a_bootstrap_interval():
    engine = Knower(0, lucky=3)
    row = measure({"a": engine}, samples=4).rows[0]
    assert (row["n"], row["samples"], row["correct"]) == (10, 4, 13)
    assert row["accuracy"] == pytest.approx(13 / 40) and row["ci95"] != wilson(13, 40)
    assert {s.temperature for s in engine.requests} == {CONFIG.evaluate.temperature}
    assert len({s.seed for s in engine.requests}) == 40


@pytest.mark.parametrize("mode, turns", [("debate", 2), ("idea3", 3)])
def test_together_the_last_answer_counts(mode, turns):
    engines = {"a": Knower(3, turns=turns), "b": Knower(8, turns=turns)}
    found = measure(engines, modes=[mode])
    assert [(r["agent"], r["mode"], r["accuracy"]) for r in found.rows] == [("a", mode, 0.3), ("b", mode, 0.8)]
    assert len(engines["a"].requests) == 10 * turns
    assert found.rows[0]["tokens_mean"] == pytest.approx(turns * 3, abs=turns / 2)


def test_a_failed_answer_is_wrong_and_counted():
    row = measure({"a": Knower(10, fails="What is 4")}).rows[0]
    assert (row["n"], row["correct"], row["failed"]) == (10, 9, 1)


def test_recording_keeps_other_agents_and_replaces_what_is_measured_again(tmp_path):
    record(tmp_path, measure({"a": Knower(3), "b": Knower(8)}))
    record(tmp_path, measure({"a": Knower(5)}))
    rows = {r["agent"]: r for r in json.loads((tmp_path / "results.json").read_text())}
    assert len(rows) == 2 and rows["a"]["accuracy"] == 0.5 and rows["b"]["accuracy"] == 0.8
    lines = [json.loads(x) for x in (tmp_path / rows["a"]["outcomes"]).read_text().splitlines()]
    assert sum(line["correct"][0] for line in lines if line["agent"] == "a") == 5
    assert sum(line["correct"][0] for line in lines if line["agent"] == "b") == 8
    assert lines[-1] == {"agent": "a", "question": "q9", "correct": [False], "answers": ["0"], "tokens": [3],
                         "texts": [" 0"]}  # fmt: skip


def test_base_and_few_shot_bases_with_the_best_marked():
    seats = {"a": Seat(Knower(2), CHAT)}
    with make_grader("number") as grader:
        found = evaluate_base(
            seats, QUESTIONS, grader, train_questions=TRAIN, config=CONFIG, benchmark="test", seed=5
        )
    assert [(r["method"], r["examples"], r["correct"], r.get("best")) for r in found.rows] == [
        ("base", None, 2, None), ("base_few_shot", 1, 3, False), ("base_few_shot", 3, 5, True)
    ]  # fmt: skip
    assert len(found.per_question) == 3


def test_worked_examples_are_training_questions_and_fewer_are_the_first_of_more():
    prompts = load_prompts("short", "number")
    three = few_shot_examples(TRAIN, 3, 5, prompts)
    assert [m.role for m in three] == ["user", "assistant"] * 3
    assert three[0].content.endswith("+ 3?") and int(three[1].content) == int(three[0].content.split()[2]) + 3
    assert few_shot_examples(TRAIN, 1, 5, prompts) == three[:2] and few_shot_examples(TRAIN, 0, 5, prompts) == []
    assert any(few_shot_examples(TRAIN, 3, seed, prompts) != three for seed in range(5))
    with pytest.raises(UserError, match="only 4 training questions"):
        few_shot_examples(TRAIN, 5, 5, prompts)


def test_errors():
    with pytest.raises(UserError, match="did you mean 'idea3'"):
        measure({"a": Knower(1)}, modes=["idea"])
    with pytest.raises(UserError, match="debate needs peers"):
        measure({"a": Knower(1)}, modes=["single", "debate"])
    with pytest.raises(UserError, match="no questions"), make_grader("number") as grader:
        evaluate_agents({}, [], grader, config=CONFIG, benchmark="test", method="ilr")


ONE_LEARNS = {"ada": AgentConfig(model="m"), "bob": AgentConfig(model="n", train="none")}


@pytest.mark.parametrize(
    "keys, name",
    [
        ({"protocol": "single"}, "grpo"),
        ({}, "ilr"),
        ({"credit": CreditConfig(calibrate="none")}, "ilr_di"),
        ({"interaction": "none"}, "ilr_pc"),
        ({"interaction": "ratio", "cooperation_ratio": 0.5}, "ilr_ratio_0.5"),
        ({"interaction": "competition"}, "ilr_ratio_0"),
        ({"interaction": "cooperation"}, "ilr_ratio_1"),
        ({"protocol": "debate"}, "debate"),
        ({"interaction": "none", "credit": CreditConfig(calibrate="none")}, "ilr_neither"),
        ({"interaction": "none", "credit": CreditConfig(calibrate="none"), "agents": ONE_LEARNS}, "grpo_peer"),
        ({"method": "mine"}, "mine"),
    ],
)
def test_names_of_methods(keys, name):
    assert method_of(replace(CONFIG, **keys)) == name
