"""Rewards → calibrated rewards → advantages, one group for each (agent, question, stage) (ILR.md, section 3).

A group holds one sample for each dialogue of its question; samples without a reward (a grader that failed, a dialogue
that broke off) are masked, so groups are ragged. All groups of a step go through one call of
`ilr_kernels.advantage.calibrated_advantage`: R̄ = R + Σₗ clip((R − Rₗ,avg)/(Rₗ,max − Rₗ,min), ±1/(m−1)), then
Â = (R̄ − mean)/(std + ε) within the group.

    credited = credit(scored, ["ada", "bob"], config.credit)
    host.update(training_sequences(credited, "ada"), step)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from ilr_kernels.advantage import calibrated_advantage

from ilr_fast.config import CreditConfig
from ilr_fast.types import Credited, Scored, TrainingSequence, TrainingTurn, Turn

GroupKey = tuple[str, str, int]  # question id, stage, which of the stage's turns (a debate may repeat a stage)


def credit(scored: Sequence[Scored], agents: Sequence[str], config: CreditConfig) -> list[Credited]:
    """Adds calibrated rewards and advantages to each scored dialogue, in the order given.

    Args:
        scored: the dialogues of one step; dialogues of one question form its groups.
        agents: every agent that calibrates, those that are not trained included.
        config: where the peers' rewards enter and how a group is normalized.
    Returns: one record a dialogue; None marks a turn whose sample is left out (no reward, or a broken dialogue).
    """
    keyed = {agent: [list(_rewards_by_key(one, agent)) for one in scored] for agent in agents}
    rows = _rows(keyed)
    sample_of = _sample_indices(scored)
    shape = (len(agents), len(rows), max(sample_of, default=-1) + 1)
    rewards_MQG, mask_MQG = np.zeros(shape), np.zeros(shape, dtype=bool)
    for m, agent in enumerate(agents):
        for turns, g in zip(keyed[agent], sample_of, strict=True):
            for key, reward in turns:
                if reward is not None:
                    rewards_MQG[m, rows[key], g], mask_MQG[m, rows[key], g] = reward, True
    calibrated_MQG = advantage_MQG = rewards_MQG.tolist()
    if mask_MQG.any():
        found = calibrated_advantage(
            torch.from_numpy(rewards_MQG),
            torch.from_numpy(mask_MQG),
            calibrate=config.calibrate,
            calibrate_weight=config.calibrate_weight,
            normalize=config.advantage,
            eps=config.eps,
        )
        calibrated_MQG, advantage_MQG = (values.tolist() for values in found)

    def read(values_MQG: list, n: int) -> dict[str, tuple[float | None, ...]]:
        return {
            agent: tuple(
                None if reward is None else values_MQG[m][rows[key]][sample_of[n]] for key, reward in keyed[agent][n]
            )
            for m, agent in enumerate(agents)
        }

    return [Credited(one, read(calibrated_MQG, n), read(advantage_MQG, n)) for n, one in enumerate(scored)]


def training_sequences(credited: Sequence[Credited], agent: str) -> list[TrainingSequence]:
    """The agent's conversations, one a dialogue, with a TrainingTurn for each turn that has an advantage.

    Broken dialogues and conversations without any such turn are left out; other turns stay as context.
    """
    sequences = []
    for one in credited:
        dialogue = one.scored.dialogue
        if dialogue.error is not None or not dialogue.turns.get(agent):
            continue
        tokens, turns = _layout(dialogue.turns[agent], one.advantages[agent])
        if turns:
            sequences.append(TrainingSequence(dialogue.question.id, dialogue.sample, tokens, turns))
    return sequences


def has_gradient(credited: Sequence[Credited], agents: Sequence[str]) -> bool:
    """Whether a turn of one of these agents has an advantage other than 0."""
    return any(any(one.advantages[agent]) for one in credited for agent in agents)


def _layout(
    turns: Sequence[Turn], advantages: Sequence[float | None]
) -> tuple[tuple[int, ...], tuple[TrainingTurn, ...]]:
    tokens: list[int] = []
    trained = []
    for turn, advantage in zip(turns, advantages, strict=True):
        generation = turn.generation
        assert len(generation.tokens) == len(generation.logps), "an engine gives one log-prob for each token"
        tokens += turn.prompt_tokens
        start = len(tokens)
        tokens += generation.tokens
        if advantage is not None and generation.tokens:
            trained.append(TrainingTurn(start, len(tokens), advantage, generation.logps))
    return tuple(tokens), tuple(trained)


def _rewards_by_key(one: Scored, agent: str) -> Iterator[tuple[GroupKey, float | None]]:
    """The agent's turns in order: the group each belongs to and its reward (None everywhere in a broken dialogue)."""
    dialogue = one.dialogue
    turns = dialogue.turns.get(agent, ())
    rewards = one.rewards.get(agent, (None,) * len(turns))
    seen: Counter[str] = Counter()
    for turn, reward in zip(turns, rewards, strict=True):
        yield (dialogue.question.id, turn.stage, seen[turn.stage]), reward if dialogue.error is None else None
        seen[turn.stage] += 1


def _rows(keyed: Mapping[str, Sequence[Sequence[tuple[GroupKey, float | None]]]]) -> dict[GroupKey, int]:
    """The row of each (question, stage) in the order of first appearance, dialogue by dialogue."""
    rows: dict[GroupKey, int] = {}
    for turns_of_agents in zip(*keyed.values(), strict=True):
        for turns in turns_of_agents:
            for key, _ in turns:
                rows.setdefault(key, len(rows))
    return rows


def _sample_indices(scored: Sequence[Scored]) -> list[int]:
    """Each dialogue's place in its question's groups: sample numbers may have gaps, places have none."""
    seen: Counter[str] = Counter()
    places = []
    for one in scored:
        places.append(seen[one.dialogue.question.id])
        seen[one.dialogue.question.id] += 1
    return places
