"""A packed row cut into blocks of queries, for attention by masks: few calls, few masked cells.

Small neighbouring subtrees are merged into one block, large ones are cut; `overhead` is the price of a call, in cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Block:
    """Queries rows start:end; `stem` are the row ranges of their common ancestors, oldest first."""

    start: int
    end: int
    stem: tuple[tuple[int, int], ...]

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Rows (first, end) of the keys that its queries see: the stem's, then its own."""
        return (*self.stem, (self.start, self.end))


class Blocks(NamedTuple):
    """Blocks, and the row cut at every border of a block or stem: `sizes` of the chunks, `chunks` of a block's keys."""

    blocks: tuple[Block, ...]
    sizes: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class Node:
    """A run of rows with the same descendants; `end` closes the run, `close` the subtree."""

    start: int
    end: int
    close: int
    depth: int  # tokens above it
    children: list[Node] = field(default_factory=list)


def cut_blocks(positions: np.ndarray, subtree_end: np.ndarray, overhead: int) -> Blocks:
    """The blocks of a packed forest, in order. `overhead`: what a block costs, in pairs of query and key."""
    blocks: list[Block] = []
    _cut_into(nodes_of(positions, subtree_end), (), 0, overhead, blocks)
    blocks.sort(key=lambda block: block.start)
    borders = sorted({edge for block in blocks for piece in block.ranges for edge in piece})
    place = {edge: n for n, edge in enumerate(borders)}
    chunks = tuple(tuple(n for start, end in block.ranges for n in range(place[start], place[end])) for block in blocks)
    sizes = tuple(end - start for start, end in zip(borders, borders[1:], strict=False))
    return Blocks(tuple(blocks), sizes, chunks)


def nodes_of(positions: np.ndarray, subtree_end: np.ndarray) -> list[Node]:
    """The trees' nodes, from the preorder arrays."""
    new = np.ones(len(positions), dtype=bool)
    new[1:] = (np.diff(positions) != 1) | (np.diff(subtree_end) != 0)
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(positions))
    roots: list[Node] = []
    open_nodes: list[Node] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        node = Node(start, end, int(subtree_end[start]), int(positions[start]))
        while open_nodes and open_nodes[-1].close <= start:
            open_nodes.pop()
        (open_nodes[-1].children if open_nodes else roots).append(node)
        open_nodes.append(node)
    return roots


def _cost(size: int, depth: int, overhead: int) -> int:
    return size * (depth + size) + overhead


def _best(node: Node, overhead: int) -> int:
    """The least cost of a subtree: as one block, or cut into its stem and its children, each at its best."""
    whole = _cost(node.close - node.start, node.depth, overhead)
    if not node.children or whole <= 2 * overhead:
        return whole
    stem = _cost(node.end - node.start, node.depth, overhead)
    return min(whole, stem + sum(_best(child, overhead) for child in node.children))


def _cut_into(
    siblings: list[Node], stem: tuple[tuple[int, int], ...], depth: int, overhead: int, blocks: list[Block]
) -> None:
    """Adds the blocks of neighbouring subtrees: neighbours are joined while that is cheaper than one more call."""
    start = end = siblings[0].start
    for node in siblings:
        size = node.close - node.start
        if _best(node, overhead) < _cost(size, depth, overhead):
            _close(start, end, stem, blocks)
            blocks.append(Block(node.start, node.end, stem))
            _cut_into(node.children, (*stem, (node.start, node.end)), depth + node.end - node.start, overhead, blocks)
            start = end = node.close
            continue
        apart = _cost(end - start, depth, overhead) + _cost(size, depth, overhead)
        if end > start and _cost(node.close - start, depth, overhead) >= apart:
            _close(start, end, stem, blocks)
            start = node.start
        end = node.close
    _close(start, end, stem, blocks)


def _close(start: int, end: int, stem: tuple[tuple[int, int], ...], blocks: list[Block]) -> None:
    if end > start:
        blocks.append(Block(start, end, stem))
