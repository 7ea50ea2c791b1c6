"""Ability and interaction, against cases worked by hand."""

from __future__ import annotations

import math

import pytest

from ilr_fast.ability import ability, cooperation_share, interactions, success_probability


def test_ability_by_hand():
    assert ability(500, 1000) == 0
    assert ability(3, 4) == pytest.approx(math.log(3) / 1.7)  # 3/4 : 1/4 = 3
    assert ability(1, 4) == pytest.approx(-math.log(3) / 1.7)


def test_ability_is_clipped_to_half_a_question():
    assert ability(10, 10) == pytest.approx(math.log(0.95 / 0.05) / 1.7)
    assert ability(0, 10) == pytest.approx(-ability(10, 10))
    assert ability(1, 1) == 0  # 1/(2n) = 1 − 1/(2n) = ½


def test_probability_by_hand():
    assert success_probability(0.7, 0.7) == 0.5
    assert success_probability(1.0, 0.0) == pytest.approx(1 / (1 + math.exp(-1.7)))
    assert success_probability(ability(3, 10), 0.0) == pytest.approx(0.3)  # P = a at D = 0
    assert success_probability(-800.0, 800.0) == 0 and success_probability(800.0, -800.0) == 1


def test_dynamic_is_by_agent_and_question():
    difficulties = {"a": {"easy": -1.0, "hard": 1.0}, "b": {"easy": 0.5, "hard": 0.5}}
    chosen = interactions(
        "dynamic", ["easy", "hard"], ["a", "b"], abilities={"a": 0.0, "b": 0.5}, difficulties=difficulties
    )
    assert chosen["easy"] == {"a": "competition", "b": "competition"}  # b: P = 0.5 exactly
    assert chosen["hard"] == {"a": "cooperation", "b": "competition"}
    assert cooperation_share(chosen, "a") == 0.5 and cooperation_share(chosen, "b") == 0


@pytest.mark.parametrize("mode", ["cooperation", "competition"])
def test_fixed(mode):
    assert interactions(mode, ["q"], ["a"]) == {"q": {"a": mode}}


def test_none_is_neutral():
    chosen = interactions("none", ["q"], ["a"])
    assert chosen == {"q": {"a": "neutral"}} and cooperation_share(chosen, "a") is None


def test_ratio_is_drawn_by_seed_question_and_agent():
    ids = [f"q{n}" for n in range(4000)]
    chosen = interactions("ratio", ids, ["a", "b"], ratio=0.3, seed=1)
    for agent in ("a", "b"):
        assert cooperation_share(chosen, agent) == pytest.approx(0.3, abs=0.03)  # 4 standard errors
    both = sum(set(c.values()) == {"cooperation"} for c in chosen.values()) / len(ids)
    assert both == pytest.approx(0.09, abs=0.02)  # independent
    assert interactions("ratio", ids[:3], ["b"], ratio=0.3, seed=1)["q2"]["b"] == chosen["q2"]["b"]
    assert interactions("ratio", ids, ["a"], ratio=0.3, seed=2) != {q: {"a": c["a"]} for q, c in chosen.items()}
    for ratio, only in ((0.0, "competition"), (1.0, "cooperation")):
        assert {c["a"] for c in interactions("ratio", ids, ["a"], ratio=ratio).values()} == {only}
