"""Rewards of turns: by stage, less the overlong penalty, less the divergence from the reference; by hand."""

from __future__ import annotations

import pytest

from ilr_fast.config import AgentConfig, Config, LossConfig, RewardConfig, RolloutConfig
from ilr_fast.protocols import load_protocol
from ilr_fast.rewards import make_grader
from ilr_fast.score import penalise_divergence, score
from ilr_fast.types import Dialogue, Generation, Question, Turn

SEVEN = Question("q", "3 + 4?", "7")
STAGES = ("sharing", "analysis", "fusion")


def dialogue(question=SEVEN, lengths=(1, 1, 1), error=None, **texts):
    """Every agent's three texts; the turns have as many tokens as `lengths` says, with log-probs −1, −2, −3 …"""
    turns = {
        name: tuple(
            Turn(stage, "neutral", "", (0,) * 2, Generation((5,) * n, tuple(-1.0 - i for i in range(n)), "stop", text))
            for stage, text, n in zip(STAGES, said, lengths, strict=True)
        )
        for name, said in texts.items()
    }
    return Dialogue(question, 0, "idea3", turns, error)


def config(**reward):
    agents = {name: AgentConfig(model=name) for name in ("ada", "bob")}
    limits = RolloutConfig(max_tokens={"default": 10, "fusion": 20})
    return Config(agents=agents, reward=RewardConfig(name="number", **reward), rollout=limits)


def scored(dialogues, **reward):
    run = config(**reward)
    with make_grader("number", format_weight=run.reward.format_weight) as grader:
        return score(dialogues, grader, load_protocol("idea3", run), run)


TEXTS = {"ada": ("7", "8", "So it is 7"), "bob": ("none", "7", "9")}


def test_own_gives_the_first_answer_its_own_reward_and_the_later_ones_the_fused():
    (item,) = scored([dialogue(**TEXTS)])
    assert item.rewards == {"ada": (1.1, 1.0, 1.0), "bob": (0.0, 0.1, 0.1)}
    assert [g.correct for g in item.grades["ada"]] == [True, False, True]
    assert [g.reward for g in item.grades["ada"]] == [1.1, 0.1, 1.0]


def test_final_gives_the_fused_answers_reward_to_every_turn():
    (item,) = scored([dialogue(**TEXTS)], stage_reward="final")
    assert item.rewards == {"ada": (1.0, 1.0, 1.0), "bob": (0.1, 0.1, 0.1)}


def test_each_gives_every_turn_its_own_answers_reward():
    (item,) = scored([dialogue(**TEXTS)], stage_reward="each")
    assert item.rewards == {"ada": (1.1, 0.1, 1.0), "bob": (0.0, 1.1, 0.1)}


def test_a_turn_pays_for_its_own_length_by_its_own_limit():
    """Buffer 4: the limit 10 costs from 7 tokens on, 20 (fusion) from 17 on."""
    (item,) = scored([dialogue(lengths=(10, 8, 19), **TEXTS)], overlong_buffer=4)
    assert item.rewards["ada"] == pytest.approx((1.1 - 1, 1.0 - 0.5, 1.0 - 0.75))
    (item,) = scored([dialogue(lengths=(6, 6, 16), **TEXTS)], overlong_buffer=4)
    assert item.rewards["ada"] == pytest.approx((1.1, 1.0, 1.0))


def test_what_failed_is_left_out_and_what_could_not_be_graded_has_no_reward():
    no_number = Question("x", "3 + 4?", "seven")
    whole = scored([dialogue(**TEXTS), dialogue(error="ada failed", ada=TEXTS["ada"], bob=TEXTS["bob"]),
                    dialogue(no_number, overlong=("a", "b", "c"))], overlong_buffer=4)  # fmt: skip
    assert [item.dialogue.question.id for item in whole] == ["q", "x"]
    assert whole[1].rewards == {"overlong": (None, None, None)}


class Reference:
    """A host whose reference gives every token the log-prob −4."""

    def __init__(self, trains=True):
        self.trains, self.asked = trains, []

    def reference_logps(self, sequences):
        self.asked += sequences
        return [tuple(-4.0 for turn in s.turns for _ in range(turn.end - turn.start)) for s in sequences]


def test_k1_takes_beta_times_the_divergence_of_each_turn_from_its_reward():
    """Turns of 1, 2, 3 tokens: Σ (logp + 4) = 3; 3 + 2; 3 + 2 + 1. A peer that only talks has no reference."""
    before = scored([dialogue(lengths=(1, 2, 3), **TEXTS)])
    hosts = {"ada": Reference(), "bob": Reference(trains=False)}
    (item,) = penalise_divergence(before, hosts, LossConfig(kl="k1", beta=0.1))
    assert item.rewards["ada"] == pytest.approx((1.1 - 0.3, 1.0 - 0.5, 1.0 - 0.6))
    assert item.rewards["bob"] == before[0].rewards["bob"] and not hosts["bob"].asked
    (sequence,) = hosts["ada"].asked
    assert sequence.tokens == (0, 0, 5, 0, 0, 5, 5, 0, 0, 5, 5, 5)
    assert [(t.start, t.end) for t in sequence.turns] == [(2, 3), (5, 7), (9, 12)]


@pytest.mark.parametrize("loss", [LossConfig(kl="k1", beta=0.0), LossConfig(kl="k2", beta=0.1)])
def test_nothing_changes_without_k1(loss):
    before = scored([dialogue(**TEXTS)])
    hosts = {"ada": Reference(), "bob": Reference()}
    assert penalise_divergence(before, hosts, loss) == before and not hosts["ada"].asked


def test_a_reward_that_is_missing_stays_missing():
    before = scored([dialogue(Question("x", "?", "seven"), ada=("a", "b", "c"))])
    (item,) = penalise_divergence(before, {"ada": Reference()}, LossConfig(kl="k1", beta=0.1))
    assert item.rewards == {"ada": (None, None, None)}
