"""Packs sequences that share prefixes into one row without padding, each shared prefix once.

The sequences of one micro-batch form a forest: whatever several of them begin with (a few-shot prompt, a group's
question) is a common stem, the rest are branches. The forest is laid out in preorder, so that token j is an ancestor of
token i, or i itself, exactly when

    j <= i < subtree_end[j]

and that is the whole attention mask; the position of a token is its depth. Hidden states and gradients are those of the
sequences run one by one, since a causal model's stem does not depend on what follows it. Sequences without a common
prefix are the case of a forest of bare stems.

Attention runs block by block. A block is a run of queries with the keys of its ancestors and its own. Small
neighbouring subtrees are merged into one block (fewer calls), large ones are cut (fewer masked cells);
`block_overhead` is the price of a call.

    packed = pack_sequences([[1, 2, 3, 4], [1, 2, 5]])
    packed.tokens_T     # 1 2 3 4 5
    packed.index_S[1]   # 0 1 4: the rows of the second sequence
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ilr_fast.prefixes import common_prefix, sorting_key
from ilr_fast.segments import KeyRun, Segments, make_segments, put
from ilr_fast.tree_blocks import Block, Blocks, cut_blocks, nodes_of

# Query-key cells that cost as much as one more attention call (forward and backward, measured with SmolLM2's heads).
CPU_BLOCK_OVERHEAD = 4096
CUDA_BLOCK_OVERHEAD = 1 << 20


@dataclass(slots=True)
class TreePlan:
    """Who attends to whom in one packed row of T tokens. Made by `pack_sequences`; masks are made at first use.

    Causal stays causal: row i attends to row j iff j <= i < subtree_end_T[j], and, in a layer with a sliding window w,
    positions_T[i] - positions_T[j] < w.
    """

    positions_T: np.ndarray
    subtree_end_T: np.ndarray
    block_overhead: int  # query-key cells that cost as much as one more attention call
    _cut: Blocks | None = None
    _masks: dict[tuple[int | None, torch.dtype, torch.device], list[Tensor | None]] = field(default_factory=dict)
    _segments: dict[torch.device, Segments] = field(default_factory=dict)
    _runs: list[KeyRun] | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.positions_T)

    @property
    def cut(self) -> Blocks:
        """The row in blocks, made when masks are first needed: a kernel that takes `segments` needs none."""
        if self._cut is None:
            self._cut = cut_blocks(self.positions_T, self.subtree_end_T, self.block_overhead)
        return self._cut

    @property
    def blocks(self) -> tuple[Block, ...]:
        """In order; together they hold every row once."""
        return self.cut.blocks

    @property
    def shares_prefixes(self) -> bool:
        """Whether any tree branches: then it has more leaves than roots."""
        leaves = self.subtree_end_T == np.arange(1, len(self.subtree_end_T) + 1)
        return int(leaves.sum()) != int((self.positions_T == 0).sum())

    @property
    def gathered(self) -> int:
        """Key rows that `segments` holds: T where nothing is shared."""
        return sum(len(rows) for _, _, rows in self.key_runs())

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.positions_T.max()) + 1

    def window(self, window: int | None) -> int | None:
        """None where every sequence is shorter than the window."""
        return None if window is None or window >= self.longest() else window

    def segments(self, device: torch.device) -> Segments:
        """The runs of this plan, made once."""
        if device not in self._segments:
            self._segments[device] = make_segments(self.key_runs(), self.tokens, device)
        return self._segments[device]

    def key_runs(self) -> list[KeyRun]:
        """Of each node, in order: its rows start:end and the rows of its keys."""
        if self._runs is None:
            self._runs = []
            waiting = [(node, np.empty(0, dtype=np.int64)) for node in nodes_of(self.positions_T, self.subtree_end_T)]
            while waiting:
                node, above = waiting.pop()
                rows = np.concatenate([above, np.arange(node.start, node.end)])
                self._runs.append((node.start, node.end, rows))
                waiting += [(child, rows) for child in node.children]
            self._runs.sort(key=lambda run: run[0])
        return self._runs

    def seen(self, window: int | None) -> np.ndarray:
        """bool [T, T]: whether row i attends to row j."""
        rows = np.arange(self.tokens)
        return self._seen(rows[:, None], rows, window)

    def _seen(self, rows_Q: np.ndarray, rows_K: np.ndarray, window: int | None) -> np.ndarray:
        seen_QK = (rows_K <= rows_Q) & (rows_Q < self.subtree_end_T[rows_K])
        if window is not None:
            seen_QK &= self.positions_T[rows_Q] - self.positions_T[rows_K] < window
        return seen_QK

    def masks(self, window: int | None, dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
        """For each block an additive mask [queries, keys] of `dtype`, or None where plain causal attention is meant."""
        window = self.window(window)
        key = (window, dtype, device)
        if key not in self._masks:
            self._masks[key] = [self._mask(block, window, dtype, device) for block in self.blocks]
        return self._masks[key]

    def _mask(self, block: Block, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        one_chain = bool((self.subtree_end_T[block.start : block.end] >= block.end).all())
        if one_chain and not block.stem and window is None:
            return None
        rows_Q = np.arange(block.start, block.end)[:, None]
        rows_K = np.concatenate([np.arange(start, end) for start, end in block.ranges])
        seen_QK = self._seen(rows_Q, rows_K, window)
        mask_QK = torch.zeros(seen_QK.shape, dtype=dtype)
        return mask_QK.masked_fill_(torch.from_numpy(~seen_QK), float("-inf")).to(device)


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """One packed row: int64 tokens and positions [T], the plan, and for each sequence the rows of its tokens, which
    stay on the host."""

    tokens_T: Tensor
    positions_T: Tensor
    plan: TreePlan
    index_S: tuple[Tensor, ...]


def pack_sequences(
    sequences: Sequence[Sequence[int] | np.ndarray],
    *,
    share_prefixes: bool = True,
    device: torch.device | str = "cpu",
    block_overhead: int | None = None,
) -> PackedSequences:
    """Packs token sequences (none empty) into one row in which common prefixes stand once.

    The hidden state after token t of sequence s is row `index_S[s][t]` of the packed forward. Rows are shared: gather
    with `hidden_TD[index]`, whose backward adds up. `share_prefixes=False` lays the sequences one after another.
    """
    if not sequences or not all(len(tokens) for tokens in sequences):
        raise ValueError("sequences: at least one sequence, and none empty, can be packed")
    device = torch.device(device)
    if block_overhead is None:
        block_overhead = CPU_BLOCK_OVERHEAD if device.type == "cpu" else CUDA_BLOCK_OVERHEAD
    tokens, positions, subtree_end, index = _lay_out(sequences, share_prefixes)
    plan = TreePlan(positions, subtree_end, block_overhead)
    tokens_T, positions_T = to_device([tokens, positions], device)
    return PackedSequences(tokens_T, positions_T, plan, tuple(torch.from_numpy(rows) for rows in index))


def to_device(vectors: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    """Vectors of one length and dtype in one transfer; each begins at a multiple of 16 bytes, as kernels like it."""
    length = len(vectors[0])
    together = np.zeros((len(vectors), length + -length % 4), dtype=vectors[0].dtype)
    for row, vector in zip(together, vectors, strict=True):
        row[:length] = vector
    return put(together, device)[:, :length].unbind()


def tree_plan(trees: Sequence[tuple[int, Sequence[int]]], *, block_overhead: int = CPU_BLOCK_OVERHEAD) -> TreePlan:
    """The plan of a row that is laid out already: for each tree the tokens of its prefix (0: none) and of its branches.

    Rows lie tree by tree, the prefix first; positions count from 0 in each sequence.
    """
    positions, subtree_end, total = [], [], 0
    for prefix, branches in trees:
        end = total + prefix + sum(branches)
        positions.append(np.arange(prefix))
        subtree_end.append(np.full(prefix, end))
        total += prefix
        for branch in branches:
            total += branch
            positions.append(np.arange(prefix, prefix + branch))
            subtree_end.append(np.full(branch, total))
    return TreePlan(np.concatenate(positions), np.concatenate(subtree_end), block_overhead)


def _lay_out(
    sequences: Sequence[Sequence[int] | np.ndarray], share: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Preorder of the forest: in sorted order each sequence adds what it does not share with the one before."""
    arrays = [np.asarray(tokens, dtype=np.int64) for tokens in sequences]
    order: Sequence[int] = range(len(arrays))
    if share:
        order = sorted(order, key=[sorting_key(array) for array in arrays].__getitem__)
    index: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(arrays)
    tokens, positions = [], []
    subtree_end = np.zeros(sum(len(a) for a in arrays), dtype=np.int64)
    total, previous, path = 0, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for s in order:
        array = arrays[s]
        common = common_prefix(previous, array) if share else 0
        subtree_end[path[common:]] = total  # these rows have no descendants beyond what has been laid out
        path = np.concatenate([path[:common], np.arange(total, total + len(array) - common)])
        tokens.append(array[common:])
        positions.append(np.arange(common, len(array)))
        index[s], previous = path, array
        total += len(array) - common
    subtree_end[path] = total
    return np.concatenate(tokens), np.concatenate(positions), subtree_end[:total], index
