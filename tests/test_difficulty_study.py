"""Self-ranked difficulty against levels, pass rates and chance: worked cases, and the command on tiny models."""

from __future__ import annotations

import json

import pytest
from end_to_end import save_models, write_config

from ilr_fast.ability import ability
from ilr_fast.cli import main
from ilr_fast.config import Config, DifficultyConfig
from ilr_fast.difficulty import from_rankings
from ilr_fast.difficulty_study import compare
from ilr_fast.ranking import windows
from ilr_fast.types import Question

IDS = [f"q{n:02d}" for n in range(60)]
CONFIG = Config(difficulty=DifficultyConfig(window=5, repeats=3, levels=3))


def study(key, levels=True, right=0.3):
    """One agent that orders each window by `key`; question n has level n // 20 + 1 and 4, 2 or 0 of 4 answers right."""
    questions = [Question(q, q, "", level=n // 20 + 1 if levels else None) for n, q in enumerate(IDS)]
    ranking = from_rankings(IDS, [sorted(w, key=key) for w in windows(IDS, 5, 3, CONFIG.seed)])
    passes = {"ada": {q: 4 - 2 * (n // 20) for n, q in enumerate(IDS)}}
    (row,) = compare({"ada": ranking}, passes, questions, CONFIG, samples=4,
                     abilities={"ada": ability(round(100 * right), 100)})  # fmt: skip
    return row


def test_who_ranks_by_level_agrees_and_who_ranks_against_it_does_not():
    row = study(key=IDS.index)
    assert row["correlation"]["level"] > 0.85 and row["correlation"]["own pass rate"] == row["correlation"]["level"]
    assert row["pass_rate_with_level"] == pytest.approx(1)
    low, high = row["random_95"]["level"]
    assert -0.4 < low < -0.15 < 0.15 < high < 0.4
    against = study(key=lambda q: -IDS.index(q))
    assert against["correlation"]["level"] == pytest.approx(-row["correlation"]["level"], abs=0.1)


def test_shares_of_cooperation_follow_from_ability():
    weak, strong = study(key=IDS.index, right=0.3), study(key=IDS.index, right=0.9)
    assert weak["cooperation_share"]["level"] == pytest.approx(2 / 3) and strong["cooperation_share"]["level"] == 0
    assert strong["random_cooperation_share"] < 0.05 < 0.6 < weak["random_cooperation_share"] < 0.95
    assert weak["cooperation_share"]["pass_rate"] == pytest.approx(2 / 3)


def test_without_levels_they_are_left_out():
    row = study(key=IDS.index, levels=False)
    assert row["correlation"]["level"] is None and row["random_95"]["level"] is None
    assert set(row["cooperation_share"]) == {"self_ranking", "pass_rate"}


def test_the_command_with_tiny_models(tmp_path, capsys):
    config = write_config(tmp_path, save_models(tmp_path))
    out = tmp_path / "difficulty.json"
    assert main(["difficulty", str(config), "--questions", "6", "--samples", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["agent"] for row in found["agents"]] == ["ada", "bob"] and found["agents"][0]["questions"] == 6
    assert "by chance" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert main(["difficulty", str(config), "--questions", "1"]) == 2
