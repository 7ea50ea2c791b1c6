"""Drop what has no gradient, weigh every token over the whole optimizer step, pack into micro-batches.

A turn with advantage 0 has no policy gradient: unless a KL or an entropy bonus acts on it, its tokens get no row in
the loss, what follows a sequence's last live turn is cut off, and a sequence without a live turn is not run at all. The
token weights come from the whole step before anything is packed, so their sum does not depend on the micro-batches
(ILR.md, section 4):

    grpo     1 / (turns · tokens of the turn)      dapo     1 / tokens      dr_grpo  1 / (turns · turn limit)

Packing (tree_plan.py) stores what sequences begin with in common once, within a group and across groups:

    prefix ─┬─ branch of sample 0          rows_N picks the hidden row that predicts each trained token; the last prefix
            ├─ branch of sample 1          row predicts every branch's first token, so a row may be picked twice.
            └─ branch of sample 2

    step = pack_step(sequences, BatchRules("grpo"), budget=8192)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Literal, overload

import numpy as np
import torch

from ilr_fast.micro_batches import fill
from ilr_fast.tree_plan import TreePlan, pack_sequences, to_device
from ilr_fast.types import TrainingSequence, TrainingTurn


@dataclass(frozen=True, slots=True)
class BatchRules:
    """What is dropped and what a token weighs.

    `keep_dead`: turns with advantage 0 still have a gradient (a KL in the loss, an entropy bonus).
    `count_dropped`: dropped turns count in the denominators. `turn_limit`: dr_grpo's constant, in tokens.
    `share_prefixes`: common prefixes are computed once (the gradient is the same).
    """

    aggregation: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    keep_dead: bool = False
    count_dropped: bool = True
    turn_limit: int = 1
    share_prefixes: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One micro-batch: T packed tokens, of which N hidden rows are read; `packed_forward` takes the first three.

    `rows_N` index T; `turn_N` numbers the turns of this micro-batch from 0, `token_N` the trained tokens of the whole
    step, however it is cut into micro-batches. Integers are int64, the rest float32.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    plan: TreePlan
    rows_N: torch.Tensor
    target_N: torch.Tensor
    advantage_N: torch.Tensor
    token_weight_N: torch.Tensor
    behavior_logp_N: torch.Tensor
    turn_N: torch.Tensor
    token_N: torch.Tensor


class Batches(Sequence[PackedBatch]):
    """Micro-batches, each packed when it is first asked for: a GPU computes one while the host packs the next."""

    def __init__(self, makers: Sequence[Callable[[], PackedBatch]]):
        self._makers = makers
        self._made: list[PackedBatch | None] = [None] * len(makers)

    def __len__(self) -> int:
        return len(self._makers)

    @overload
    def __getitem__(self, at: int) -> PackedBatch: ...
    @overload
    def __getitem__(self, at: slice) -> list[PackedBatch]: ...
    def __getitem__(self, at: int | slice) -> PackedBatch | list[PackedBatch]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        made = self._made[at]
        if made is None:
            made = self._made[at] = self._makers[at]()
        return made


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The micro-batches of one optimizer step, how many sampled tokens are in the loss and how many are not, and the
    length of the longest sequence that is run."""

    batches: Batches
    tokens_trained: int
    tokens_dropped: int
    longest: int


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """A sequence as it is run: its `inputs` end before the last trained token, which is only a target."""

    tokens: np.ndarray
    turns: tuple[TrainingTurn, ...]
    weights: tuple[float, ...]  # of one token, by turn
    first: int  # the number of its first trained token in the step

    @property
    def inputs(self) -> np.ndarray:
        return self.tokens[: self.turns[-1].end - 1]


def split_by_question(sequences: Sequence[TrainingSequence], parts: int) -> list[list[TrainingSequence]]:
    """Splits into at most `parts` minibatches of whole groups, equal in groups up to one, in order; none is empty."""
    groups = list(dict.fromkeys(s.group for s in sequences))
    parts = min(parts, len(groups))
    part_of = {group: i * parts // len(groups) for i, group in enumerate(groups)}
    return [[s for s in sequences if part_of[s.group] == part] for part in range(parts)]


def pack_step(
    sequences: Sequence[TrainingSequence], rules: BatchRules, budget: int, device: torch.device | str = "cpu"
) -> PackedStep:
    """Packs one optimizer step's sequences into micro-batches of at most `budget` tokens, deterministically.

    Micro-batches are filled evenly (micro_batches.py); a sequence longer than the budget goes alone. With no live turn
    anywhere there are no batches. Tensors are on `device`.
    """
    kept = _weigh(sequences, rules)
    share = rules.share_prefixes
    parts = fill([sequence.inputs for sequence in kept], budget, share_prefixes=share)
    batches = Batches([partial(_pack, [kept[s] for s in part], torch.device(device), share) for part in parts])
    trained = sum(turn.end - turn.start for s in kept for turn in s.turns)
    sampled = sum(turn.end - turn.start for s in sequences for turn in s.turns)
    return PackedStep(batches, trained, sampled - trained, max((len(s.inputs) for s in kept), default=0))


def _weigh(sequences: Sequence[TrainingSequence], rules: BatchRules) -> list[_Kept]:
    live = [tuple(t for t in s.turns if rules.keep_dead or t.advantage != 0) for s in sequences]
    counted = [t for turns in ([s.turns for s in sequences] if rules.count_dropped else live) for t in turns]
    total = max(sum(t.end - t.start for t in counted), 1)
    number = max(len(counted), 1)

    def weight(turn: TrainingTurn) -> float:
        if rules.aggregation == "dapo":
            return 1 / total
        return 1 / (number * (rules.turn_limit if rules.aggregation == "dr_grpo" else turn.end - turn.start))

    lengths = [sum(t.end - t.start for t in turns) for turns in live]
    firsts = [0, *accumulate(lengths)]
    return [
        _Kept(np.fromiter(s.tokens, dtype=np.int64, count=turns[-1].end), turns, tuple(map(weight, turns)), first)
        for s, turns, first in zip(sequences, live, firsts, strict=False)
        if turns
    ]


def _pack(sequences: Sequence[_Kept], device: torch.device, share: bool) -> PackedBatch:
    packed = pack_sequences([s.inputs for s in sequences], share_prefixes=share, device=device)
    turns = [
        (sequence, turn, weight, index)
        for sequence, index in zip(sequences, packed.index_S, strict=True)
        for turn, weight in zip(sequence.turns, sequence.weights, strict=True)
    ]
    assert all(0 < t.start < t.end for _, t, _, _ in turns), "a turn has a token before it and one of its own"
    assert all(len(t.behavior_logps) == t.end - t.start for _, t, _, _ in turns), "one behavior log-prob for each token"
    lengths = [t.end - t.start for _, t, _, _ in turns]

    def by_token(values: Iterable[float]) -> np.ndarray:
        return np.repeat(np.fromiter(values, dtype=np.float32), lengths)

    rows_N, target_N, turn_N, token_N = to_device(
        [
            np.concatenate([index[t.start - 1 : t.end - 1].numpy() for _, t, _, index in turns]),
            np.concatenate([s.tokens[t.start : t.end] for s, t, _, _ in turns]),
            np.repeat(np.arange(len(turns)), lengths),
            np.concatenate([_numbers(s) for s in sequences]),
        ],
        device,
    )
    advantage_N, token_weight_N, behavior_logp_N = to_device(
        [
            by_token(t.advantage for _, t, _, _ in turns),
            by_token(weight for _, _, weight, _ in turns),
            np.fromiter(chain.from_iterable(t.behavior_logps for _, t, _, _ in turns), np.float32, sum(lengths)),
        ],
        device,
    )
    return PackedBatch(packed.tokens_T, packed.positions_T, packed.plan, rows_N, target_N, advantage_N, token_weight_N,
                       behavior_logp_N, turn_N, token_N)  # fmt: skip


def _numbers(sequence: _Kept) -> np.ndarray:
    """The numbers of its trained tokens in the step."""
    count = sum(t.end - t.start for t in sequence.turns)
    return np.arange(sequence.first, sequence.first + count)
