"""Frozen records that pass from stage to stage, each made once:

    Question → Dialogue → Scored → Credited → TrainingSequence → (PackedBatch, in batch.py) → StepResult

This module imports nothing but the standard library. Shape suffixes, used for tensors and for ragged lists alike:

    _M agents     _Q questions (times stages where a group is meant)     _G samples of a group
    _S sequences  _T packed tokens   _D hidden size   _V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Interaction = Literal["cooperation", "competition", "neutral"]
FinishReason = Literal["stop", "length", "error"]
Role = Literal["system", "user", "assistant"]
# What an agent holds of its device's memory: weights, keys and values; weights, and what training takes; nothing.
Residence = Literal["awake", "training", "away"]


@dataclass(frozen=True, slots=True)
class Question:
    """A problem with an answer that can be checked.

    `metadata` holds what a grader needs beside `answer` (a code problem's tests, a generated task's entry).
    `level` counts from 1; `canonical` is equal for two problems that are the same in another order.
    """

    id: str
    text: str
    answer: str
    solution: str | None = None
    level: int | None = None
    subject: str | None = None
    canonical: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat, as text, before a template renders it."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request is sampled. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    `seed` belongs to the request: the same request with the same seed gives the same tokens whatever shares its batch.
    `turn`: turns of the same conversation before this one; where not all requests fit, who is further along goes first.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine sampled for one request.

    `tokens` are the engine's own, the end-of-turn token (or the tokens that completed a stop string) included;
    `logps` are their natural log-probs under softmax(logits / temperature), before top-k and top-p (at temperature 1
    when greedy); `text` is decoded without special tokens and without the stop string.
    """

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    finish: FinishReason
    text: str
    error: str | None = None


class Engine(Protocol):
    """Generates tokens. Requests may be awaited concurrently; the engine batches them as it sees fit."""

    max_context: int  # tokens of prompt and generation together

    async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Samples a continuation of `tokens`. A request that fails gives `finish="error"`, never an exception."""
        ...

    def weights_changed(self) -> None:
        """Forgets everything computed with the old weights (prefix cache included)."""
        ...

    def forget(self) -> None:
        """Drops the prefix cache; the weights are those that the engine has."""
        ...

    def reside(self, residence: Residence) -> None:
        """Gives memory back, or takes it again: `training` and `away` without keys and values, `away` without weights.

        Weights come back bit for bit, the cache comes back empty. Nothing may run, and nothing is generated until the
        engine is `awake` again. UserError where the memory is not there.
        """
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of one agent: `prompt_tokens` were appended (no loss), `generation` is the agent's own (loss)."""

    stage: str
    interaction: Interaction
    message: str
    prompt_tokens: tuple[int, ...]
    generation: Generation


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The `sample`-th discussion of one question: every agent's conversation, by agent name.

    An agent's conversation is one token sequence: the turns' `prompt_tokens` and `generation.tokens`, in order.
    A dialogue that broke off has `error` set and is left out of training.
    """

    question: Question
    sample: int
    protocol: str
    turns: Mapping[str, tuple[Turn, ...]]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Grade:
    """A grader's verdict on one text. `reward` is None where the grader itself failed (`error` says how)."""

    reward: float | None
    correct: bool
    formatted: bool
    answer: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A dialogue with, by agent and turn, the grade of the turn's own text and the reward the turn is given."""

    dialogue: Dialogue
    grades: Mapping[str, tuple[Grade, ...]]
    rewards: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True, slots=True)
class Credited:
    """A scored dialogue with, by agent and turn, the calibrated reward and the advantage (None: sample left out)."""

    scored: Scored
    calibrated: Mapping[str, tuple[float | None, ...]]
    advantages: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True, slots=True)
class TrainingTurn:
    """A turn inside a training sequence: tokens[start:end] are the agent's own and share one advantage."""

    start: int
    end: int
    advantage: float
    behavior_logps: tuple[float, ...]  # the engine's, one for each token of the turn


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """One agent's conversation in one dialogue, ready to be packed. `group` names the question."""

    group: str
    sample: int
    tokens: tuple[int, ...]
    turns: tuple[TrainingTurn, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one agent's update reports. Numbers that do not exist are None, never 0.

    `metrics` has the keys of a metrics row that the agent knows (loss, entropy, kl_reference, grad_norm, …).
    """

    metrics: Mapping[str, float | None]
    tokens_trained: int
    tokens_dropped: int
    skipped: str | None = None  # why no update was made (no gradient anywhere, a NaN gradient), else None
    note: str | None = None  # what the user should know of it, else None
