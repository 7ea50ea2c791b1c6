"""Groups, calibration and advantages of whole dialogues, worked by hand."""

import math

import pytest

from ilr_fast.config import CreditConfig
from ilr_fast.credit import credit, training_sequences
from ilr_fast.types import Dialogue, Generation, Question, Scored, Turn

PAIR = 1 / math.sqrt(2)  # (1 − ½)/std of {0, 1}, std with n − 1


def dialogue(question, sample, agents, stages=("only",), error=None):
    turns = {}
    for agent in agents:
        turns[agent] = tuple(
            Turn(stage, "neutral", "", (1, 2), Generation((10 + i, 20 + i), (-0.5, -0.25), "stop", ""))
            for i, stage in enumerate(stages)
        )
    return Dialogue(Question(question, "", ""), sample, "test", turns, error)


def scored(question, sample, error=None, stages=("only",), **rewards):
    return Scored(dialogue(question, sample, rewards, stages, error), {}, rewards)


def test_plain_grpo_of_one_agent():
    done = credit([scored("q", 0, a=(1.0,)), scored("q", 1, a=(0.0,))], ["a"], CreditConfig(eps=0))
    assert [d.calibrated["a"] for d in done] == [(1.0,), (0.0,)]
    assert [d.advantages["a"][0] for d in done] == pytest.approx([PAIR, -PAIR])


def test_groups_are_of_question_and_stage():
    both = ("sharing", "fusion")
    given = [
        scored("q", 0, stages=both, a=(1.0, 0.0)), scored("r", 0, stages=both, a=(1.0, 0.0)),
        scored("q", 1, stages=both, a=(0.0, 0.0)), scored("r", 1, stages=both, a=(1.0, 1.0)),
    ]  # fmt: skip
    done = credit(given, ["a"], CreditConfig(eps=0))
    assert [d.advantages["a"] for d in done] == [
        pytest.approx(x) for x in ((PAIR, 0), (0, -PAIR), (-PAIR, 0), (0, PAIR))
    ]


def test_a_stage_that_comes_twice_has_two_groups():
    given = [scored("q", i, stages=("say", "say"), a=(float(i), 1.0)) for i in range(2)]
    done = credit(given, ["a"], CreditConfig(eps=0))
    assert [d.advantages["a"] for d in done] == [pytest.approx((-PAIR, 0)), pytest.approx((PAIR, 0))]


def test_peers_calibrate_the_reward():
    # a: 1, 0, 0.1; b: 1, 0, 0 with mean 1/3, range 1. The terms are clipped to ±1.
    given = [scored("q", i, a=(x,), b=(y,)) for i, (x, y) in enumerate([(1.0, 1.0), (0.0, 0.0), (0.1, 0.0)])]
    done = credit(given, ["a", "b"], CreditConfig())
    assert [d.calibrated["a"][0] for d in done] == pytest.approx([1 + 2 / 3, -1 / 3, 0.1 + 0.1 - 1 / 3])
    mean_a, range_a = 1.1 / 3, 1.0
    assert [d.calibrated["b"][0] for d in done] == pytest.approx([1 + (1 - mean_a) / range_a, -mean_a, -mean_a])


def test_a_peer_whose_rewards_are_equal_gives_the_limit():
    given = [scored("q", i, a=(x,), b=(0.1,)) for i, x in enumerate((1.0, 0.1, 0.0))]
    done = credit(given, ["a", "b"], CreditConfig())
    assert [d.calibrated["a"][0] for d in done] == pytest.approx([2.0, 0.1, -1.0])


def test_samples_without_a_reward_are_left_out_and_groups_are_ragged():
    given = [
        scored("q", 3, a=(1.0,), b=(1.0,)),
        scored("q", 5, a=(None,), b=(1.0,)),
        scored("q", 9, a=(0.0,), b=(None,)),
        scored("q", 11, error="engine failed", a=(1.0,), b=(0.0,)),
    ]
    done = credit(given, ["a", "b"], CreditConfig(calibrate="none", eps=0))
    assert [d.advantages["a"][0] for d in done] == [pytest.approx(PAIR), None, pytest.approx(-PAIR), None]
    assert [d.advantages["b"][0] for d in done] == [0.0, 0.0, None, None]
    assert [s.sample for s in training_sequences(done, "a")] == [3, 9]


def test_equal_rewards_have_exactly_no_advantage():
    done = credit([scored("q", i, a=(0.1,), b=(i % 2,)) for i in range(7)], ["a", "b"], CreditConfig())
    assert {d.advantages["a"][0] for d in done} == {0.0}


def test_nothing_to_credit():
    assert credit([], ["a"], CreditConfig()) == []
    (alone,) = credit([scored("q", 0, a=(None,))], ["a"], CreditConfig())
    assert alone.advantages == {"a": (None,)} and training_sequences([alone], "a") == []


def test_training_sequences_hold_the_engines_tokens():
    given = [scored("q", i, stages=("sharing", "fusion"), a=(float(i), None)) for i in range(2)]
    first, second = training_sequences(credit(given, ["a"], CreditConfig(eps=0)), "a")
    assert first.tokens == (1, 2, 10, 20, 1, 2, 11, 21) and first.group == "q"
    (turn,) = second.turns  # the fusion has no reward and stays as context
    assert (turn.start, turn.end, turn.behavior_logps) == (2, 4, (-0.5, -0.25))
    assert turn.advantage == pytest.approx(PAIR)
