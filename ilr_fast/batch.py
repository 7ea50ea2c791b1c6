"""Drop what has no gradient, weigh every token over the whole optimizer step, pack into micro-batches.

A turn with advantage 0 has no policy gradient: unless a KL or an entropy bonus acts on it, its tokens get no row in
the loss, what follows a sequence's last live turn is cut off, and a sequence without a live turn is not run at all. The
token weights come from the whole step before anything is packed, so their sum does not depend on the micro-batches
(ILR.md, section 4):

    grpo     1 / (turns · tokens of the turn)      dapo     1 / tokens      dr_grpo  1 / (turns · turn limit)

Packing stores the longest common token prefix of a group once:

    prefix ─┬─ branch of sample 0          rows_N picks the hidden row that predicts each trained token; the last prefix
            ├─ branch of sample 1          row predicts every branch's first token, so a row may be picked several times.
            └─ branch of sample 2

    step = pack_step(sequences, BatchRules("grpo"), budget=8192)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ilr_fast.types import TrainingSequence, TrainingTurn


@dataclass(frozen=True, slots=True)
class BatchRules:
    """What is dropped and what a token weighs.

    `keep_dead`: turns with advantage 0 still have a gradient (a KL in the loss, an entropy bonus).
    `count_dropped`: dropped turns count in the denominators. `turn_limit`: dr_grpo's constant, in tokens.
    """

    aggregation: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    keep_dead: bool = False
    count_dropped: bool = True
    turn_limit: int = 1


@dataclass(frozen=True, slots=True)
class Tree:
    """Token counts of a group in a pack: the common prefix first, then its branches, one after the other."""

    prefix: int
    branches: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One micro-batch. N counts trained tokens; T counts packed tokens, which lie in the order of `trees`.

    `positions_T` count from 0 in each sequence; `rows_N` index T; `turn_N` numbers the turns of this micro-batch from 0.
    Integers are int64, the rest float32, all on the CPU.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    trees: tuple[Tree, ...]
    rows_N: torch.Tensor
    target_N: torch.Tensor
    advantage_N: torch.Tensor
    token_weight_N: torch.Tensor
    behavior_logp_N: torch.Tensor
    turn_N: torch.Tensor


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The micro-batches of one optimizer step, and how many sampled tokens are in the loss and how many are not."""

    batches: tuple[PackedBatch, ...]
    tokens_trained: int
    tokens_dropped: int


@dataclass(frozen=True, slots=True)
class _Kept:
    """A sequence as it is run: `inputs` end before the last trained token, which is only a target."""

    group: str
    inputs: tuple[int, ...]
    tokens: tuple[int, ...]
    turns: tuple[TrainingTurn, ...]
    weights: tuple[float, ...]  # of one token, by turn


def split_by_question(sequences: Sequence[TrainingSequence], parts: int) -> list[list[TrainingSequence]]:
    """Splits into at most `parts` minibatches of whole groups, equal in groups up to one, in order; none is empty."""
    groups = list(dict.fromkeys(s.group for s in sequences))
    parts = min(parts, len(groups))
    part_of = {group: i * parts // len(groups) for i, group in enumerate(groups)}
    return [[s for s in sequences if part_of[s.group] == part] for part in range(parts)]


def pack_step(sequences: Sequence[TrainingSequence], rules: BatchRules, budget: int) -> PackedStep:
    """Packs one optimizer step's sequences into micro-batches of at most `budget` tokens, deterministically.

    Groups stay together where they fit and are split between samples where they do not; a sequence longer than the
    budget goes alone. With no live turn anywhere there are no batches.
    """
    kept = _weigh(sequences, rules)
    batches = tuple(_pack(trees) for trees in _micro_batches(_by_group(kept), budget))
    trained = sum(b.rows_N.numel() for b in batches)
    sampled = sum(turn.end - turn.start for s in sequences for turn in s.turns)
    return PackedStep(batches, trained, sampled - trained)


def _weigh(sequences: Sequence[TrainingSequence], rules: BatchRules) -> list[_Kept]:
    live = [tuple(t for t in s.turns if rules.keep_dead or t.advantage != 0) for s in sequences]
    counted = [t for turns in ([s.turns for s in sequences] if rules.count_dropped else live) for t in turns]
    total = max(sum(t.end - t.start for t in counted), 1)
    number = max(len(counted), 1)

    def weight(turn: TrainingTurn) -> float:
        if rules.aggregation == "dapo":
            return 1 / total
        return 1 / (number * (rules.turn_limit if rules.aggregation == "dr_grpo" else turn.end - turn.start))

    return [
        _Kept(s.group, s.tokens[: turns[-1].end - 1], s.tokens, turns, tuple(map(weight, turns)))
        for s, turns in zip(sequences, live, strict=True)
        if turns
    ]


def _by_group(kept: Sequence[_Kept]) -> list[list[_Kept]]:
    groups: dict[str, list[_Kept]] = {}
    for sequence in kept:
        groups.setdefault(sequence.group, []).append(sequence)
    return list(groups.values())


def _micro_batches(groups: Sequence[list[_Kept]], budget: int) -> list[list[list[_Kept]]]:
    """Fills micro-batches in order with whole groups, or with parts of a group that alone exceeds the budget."""
    packs: list[list[list[_Kept]]] = []
    room = 0
    for group in groups:
        for part in _split(group, budget):
            size = _tokens(part)
            if not packs or size > room:
                packs.append([])
                room = budget
            packs[-1].append(part)
            room -= size
    return packs


def _split(group: list[_Kept], budget: int) -> list[list[_Kept]]:
    if _tokens(group) <= budget:
        return [group]
    prefix = _common_prefix(group)
    parts: list[list[_Kept]] = []
    room = 0
    for sequence in group:
        branch = len(sequence.inputs) - prefix
        if not parts or branch > room:
            parts.append([])
            room = budget - prefix
        parts[-1].append(sequence)
        room -= branch
    return parts


def _tokens(group: Sequence[_Kept]) -> int:
    prefix = _common_prefix(group)
    return prefix + sum(len(s.inputs) - prefix for s in group)


def _common_prefix(group: Sequence[_Kept]) -> int:
    """The longest common prefix of all is that of the first and the last in sorted order."""
    first, last = min(s.inputs for s in group), max(s.inputs for s in group)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _pack(groups: Sequence[list[_Kept]]) -> PackedBatch:
    tokens: list[int] = []
    positions: list[torch.Tensor] = []
    trees = []
    rows = _Rows()
    for group in groups:
        prefix, root = _common_prefix(group), len(tokens)
        tokens += group[0].inputs[:prefix]
        positions.append(torch.arange(prefix))
        branches = []
        for sequence in group:
            length = len(sequence.inputs)
            index = torch.cat([torch.arange(root, root + prefix), torch.arange(len(tokens), len(tokens) + length - prefix)])
            rows.add(sequence, index)
            if length > prefix:
                tokens += sequence.inputs[prefix:]
                positions.append(torch.arange(prefix, length))
                branches.append(length - prefix)
        trees.append(Tree(prefix, tuple(branches)))
    return rows.batch(torch.tensor(tokens), torch.cat(positions), tuple(trees))


class _Rows:
    """Collects the trained tokens of a micro-batch, turn by turn."""

    def __init__(self) -> None:
        self.index: list[torch.Tensor] = []
        self.targets: list[int] = []
        self.behavior: list[float] = []
        self.lengths: list[int] = []
        self.advantages: list[float] = []
        self.weights: list[float] = []

    def add(self, sequence: _Kept, index: torch.Tensor) -> None:
        """`index[t]` is the packed place of the sequence's token t."""
        for turn, weight in zip(sequence.turns, sequence.weights, strict=True):
            assert 0 < turn.start < turn.end, "a turn has a token before it and one of its own"
            assert len(turn.behavior_logps) == turn.end - turn.start, "one behavior log-prob for each token"
            self.index.append(index[turn.start - 1 : turn.end - 1])
            self.targets += sequence.tokens[turn.start : turn.end]
            self.behavior += turn.behavior_logps
            self.lengths.append(turn.end - turn.start)
            self.advantages.append(turn.advantage)
            self.weights.append(weight)

    def batch(self, tokens_T: torch.Tensor, positions_T: torch.Tensor, trees: tuple[Tree, ...]) -> PackedBatch:
        lengths = torch.tensor(self.lengths)

        def by_token(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths)

        return PackedBatch(
            tokens_T=tokens_T, positions_T=positions_T, trees=trees,
            rows_N=torch.cat(self.index), target_N=torch.tensor(self.targets),
            advantage_N=by_token(self.advantages), token_weight_N=by_token(self.weights),
            behavior_logp_N=torch.tensor(self.behavior, dtype=torch.float32),
            turn_N=torch.arange(len(self.lengths)).repeat_interleave(lengths),
        )
