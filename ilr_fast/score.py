"""Dialogues → Scored: every turn's own text is graded, and every turn is given the reward its protocol says.

A turn's reward is that of the answer in the turn which `protocol.reward_stage` names (ILR.md, section 3), less the soft
overlong penalty of the turn itself. A grade that could not be made gives the reward None: that sample is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ilr_fast.config import Config, LossConfig, turn_limit
from ilr_fast.hosts import Host
from ilr_fast.protocols import DialogueProtocol
from ilr_fast.rewards import Grader, overlong
from ilr_fast.types import Dialogue, Grade, Scored, TrainingSequence, TrainingTurn, Turn


def score(dialogues: Sequence[Dialogue], grader: Grader, protocol: DialogueProtocol, config: Config) -> list[Scored]:
    """Grades all turns of the dialogues that did not fail, in one call of the grader; keeps the order."""
    whole = [d for d in dialogues if d.error is None]
    texts = [(d.question, turn.generation.text) for d in whole for turns in d.turns.values() for turn in turns]
    grades = iter(grader.grade_many(texts))
    return [_scored(d, {name: tuple(next(grades) for _ in turns) for name, turns in d.turns.items()}, protocol, config)
            for d in whole]


def _scored(
    dialogue: Dialogue, grades: dict[str, tuple[Grade, ...]], protocol: DialogueProtocol, config: Config
) -> Scored:
    rewards = {}
    for name, turns in dialogue.turns.items():
        by_stage = {turn.stage: grade.reward for turn, grade in zip(turns, grades[name], strict=True)}
        sources = [by_stage[protocol.reward_stage(turn.stage, config.reward.stage_reward)] for turn in turns]
        rewards[name] = tuple(
            None if reward is None else reward - _overlong(turn, config)
            for turn, reward in zip(turns, sources, strict=True)
        )
    return Scored(dialogue, grades, rewards)


def _overlong(turn: Turn, config: Config) -> float:
    if not config.reward.overlong_buffer:
        return 0.0
    limit = turn_limit(config.rollout, turn.stage)
    return overlong(len(turn.generation.tokens), limit, config.reward.overlong_buffer)


def penalise_divergence(scored: Sequence[Scored], hosts: Mapping[str, Host], loss: LossConfig) -> list[Scored]:
    """`loss.kl: k1`: every turn's reward less β · Σ (behavior log-prob − reference log-prob) over its tokens.

    k1 acts in the reward alone: as a loss its expected gradient is 0. Nothing changes with another estimator or β = 0.
    """
    if loss.kl != "k1" or loss.beta == 0:
        return list(scored)
    penalties = {name: _divergence(scored, name, host) for name, host in hosts.items() if host.trains}
    return [
        replace(item, rewards={
            name: tuple(r if r is None else r - loss.beta * k for r, k in zip(rewards, penalties[name][i], strict=True))
            if name in penalties else rewards
            for name, rewards in item.rewards.items()
        })
        for i, item in enumerate(scored)
    ]


def _divergence(scored: Sequence[Scored], name: str, host: Host) -> list[list[float]]:
    """Σ (log π_behavior − log π_ref) of each of an agent's turns, by dialogue."""
    sequences = [_whole_sequence(item.dialogue, name) for item in scored]
    found = []
    for sequence, reference_logps in zip(sequences, host.reference_logps(sequences), strict=True):
        left = list(reference_logps)
        sums = []
        for turn in sequence.turns:
            own, left = left[: turn.end - turn.start], left[turn.end - turn.start :]
            sums.append(sum(turn.behavior_logps) - sum(own))
        found.append(sums)
    return found


def _whole_sequence(dialogue: Dialogue, name: str) -> TrainingSequence:
    tokens: list[int] = []
    turns = []
    for turn in dialogue.turns[name]:
        start = len(tokens) + len(turn.prompt_tokens)
        tokens += [*turn.prompt_tokens, *turn.generation.tokens]
        turns.append(TrainingTurn(start, len(tokens), 1.0, turn.generation.logps))
    return TrainingSequence(dialogue.question.id, dialogue.sample, tuple(tokens), tuple(turns))
