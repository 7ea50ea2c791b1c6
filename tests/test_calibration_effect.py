"""What calibration changes, recomputed on dialogues: nothing with two values and std, a factor without std."""

from __future__ import annotations

import random

import pytest

from ilr_fast.calibration_effect import effects, table
from ilr_fast.config import Config, PromptConfig, RewardConfig
from ilr_fast.types import Dialogue, Generation, Grade, Question, Scored, Turn

STAGES = ("sharing", "analysis", "fusion")


def steps(agents=("ada", "bob"), seed=0):
    """One step of 12 questions × 8 dialogues with random grades."""
    draw, made = random.Random(seed), []
    for q in range(12):
        chances = {name: draw.choice((0.0, 0.3, 0.7, 1.0)) for name in agents}
        for sample in range(8):
            turns = {name: tuple(Turn(s, "neutral", "", (1,), Generation((2,), (-1.0,), "stop", "")) for s in STAGES)
                     for name in agents}  # fmt: skip
            grades = {
                name: tuple(Grade(0.0, draw.random() < chances[name], draw.random() < 0.8) for _ in STAGES)
                for name in agents
            }
            dialogue = Dialogue(Question(f"q{q}", "", ""), sample, "idea3", turns)
            made.append(Scored(dialogue, grades, {name: (0.0,) * 3 for name in agents}))
    return [made]


CONFIG = Config(prompts=PromptConfig(file="short"), reward=RewardConfig(name="number"))


@pytest.fixture(scope="module")
def rows():
    return {(r["reward"], r["advantage"], r["calibrate"]): r for r in effects(steps(), CONFIG)}


def test_two_values_by_std_are_a_noop_up_to_eps(rows):
    row = rows["binary", "grpo", "reward"]
    assert row["groups"] == 2 * 12 * 3 and row["turns"] == 8 * row["groups"]
    assert 0 < row["largest"] < 5e-4 and row["correlation"] > 0.9999999 and row["reshaped"] == row["flat_moved"] == 0


def test_two_values_without_std_are_doubled(rows):
    row = rows["binary", "dr_grpo", "reward"]
    assert row["slope"] == pytest.approx(2) and row["reshaped"] == 0 and row["correlation"] == pytest.approx(1)
    (three,) = (r for r in effects(steps(("a", "b", "c")), CONFIG)
                if (r["reward"], r["advantage"], r["calibrate"]) == ("binary", "dr_grpo", "reward"))  # fmt: skip
    assert 2 < three["slope"] < 3 and three["reshaped"] == 0 and three["correlation"] < 1


def test_graded_rewards_are_reshaped(rows):
    row = rows["graded", "grpo", "reward"]
    assert row["largest"] > 0.05 and row["reshaped"] > 0.05 and row["flat_moved"] == 0


def test_on_the_advantage_flat_groups_move(rows):
    row = rows["binary", "grpo", "advantage"]
    assert row["flat_moved"] > 0.3 and row["correlation"] < 0.99
    assert "| binary | grpo | advantage |" in table(list(rows.values()))
