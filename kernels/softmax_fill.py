"""A chunk's softmax on a GPU in bfloat16: the launches around the product that takes its sums (formulas:
`softmax_product_kernel.py`).

    target's logits → product → [gate] → sums → (again, relative to the peak, where a sum overflowed)

Exponentials lie in one block, or in two that each hold a part of the vocabulary: the product is then launched for each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
from ilr_kernels import softmax_product_kernel as product
from ilr_kernels import softmax_rows_kernel as kernels
from ilr_kernels.launch import launch
from ilr_kernels.product_plan import Plan, plan
from ilr_kernels.rows import Gate
from ilr_kernels.sweep import Head
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634
Product = Callable[["Tensor | None"], None]  # launches; given a flag, the kernel works only where that is set


def cut(x_N: Tensor, rows: slice) -> Tensor:
    """Some rows of x; all of them cost nothing."""
    return x_N if rows.stop - rows.start == x_N.shape[0] else x_N[rows]


class Block(NamedTuple):
    """The exponentials of tokens `first` to `end`, a part of the vocabulary; None where they are not kept."""

    first: int
    end: int
    exps_NV: Tensor | None

    @property
    def kept_NV(self) -> Tensor:
        """The exponentials, of a block that keeps them."""
        assert self.exps_NV is not None
        return self.exps_NV

    def head(self, head: Head) -> Head:
        """The part of the head that belongs to it."""
        if self.first == 0 and self.end == head.weight_VD.shape[0]:
            return head
        bias_V = None if head.bias_V is None else head.bias_V[self.first : self.end]
        return head._replace(weight_VD=head.weight_VD[self.first : self.end], bias_V=bias_V)

    def target(self, target_C: Tensor) -> Tensor:
        """Targets counted from its first token; outside are those of other blocks."""
        return target_C if self.first == 0 else target_C - self.first


class Softmax(NamedTuple):
    """What one pass over N rows leaves: float32 vectors, and the exponentials, by blocks of the vocabulary."""

    logp_N: Tensor
    entropy_N: Tensor | None
    target_x_N: Tensor
    shift_N: Tensor
    others_N: Tensor
    blocks: tuple[Block, ...]

    def at(self, rows: slice) -> Softmax:
        """The same of a chunk's rows, whose exponentials are the blocks' first rows."""
        first = slice(0, rows.stop - rows.start)
        blocks = tuple(b if b.exps_NV is None else b._replace(exps_NV=cut(b.exps_NV, first)) for b in self.blocks)
        entropy_N = None if self.entropy_N is None else cut(self.entropy_N, rows)
        shifts = cut(self.target_x_N, rows), cut(self.shift_N, rows), cut(self.others_N, rows)
        return Softmax(cut(self.logp_N, rows), entropy_N, *shifts, blocks)


class _Chunk(NamedTuple):
    """What the launches of one chunk share: operands, plan, and room for the sums of each tile."""

    head: Head
    hidden_CD: Tensor
    target_C: Tensor
    softmax: Softmax
    plan: Plan
    tiles: int  # of the vocabulary
    total: Tensor  # [tiles, rows]
    moment: Tensor
    redo: Tensor  # [1] int32

    @property
    def rows(self) -> int:
        return self.hidden_CD.shape[0]


class _Part(NamedTuple):
    """A chunk's product with one block of the vocabulary."""

    chunk: _Chunk
    head: Head
    target_C: Tensor
    exps_CV: Tensor | None
    total: Tensor
    moment: Tensor
    programs: int

    @classmethod
    def of(cls, chunk: _Chunk, block: Block) -> _Part:
        p = chunk.plan
        tiles = slice(block.first // p.block_n, -(-block.end // p.block_n))
        programs = min(p.programs, (tiles.stop - tiles.start) * -(-chunk.rows // p.block_m))
        sums = chunk.total[tiles], chunk.moment[tiles]
        return cls(chunk, block.head(chunk.head), block.target(chunk.target_C), block.exps_NV, *sums, programs)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, vocabulary, hidden size)."""
        return self.chunk.rows, *self.head.weight_VD.shape


def fill(
    head: Head, hidden_CD: Tensor, target_C: Tensor, softmax: Softmax, slope: bool, gate: Gate | None = None
) -> None:
    """Computes a chunk's softmax into `softmax`; `slope`: the soft-cap's derivative goes into what is stored.

    With a `gate` the product does nothing unless all rows are needed; the host learns whether they are when the GPU has
    its work. What follows the first sums does nothing unless a sum overflowed.
    """
    chosen = plan(hidden_CD, head.weight_VD, head.softcap is not None)
    tiles = -(-head.weight_VD.shape[0] // chosen.block_n)
    total, moment = (softmax.logp_N.new_empty(tiles, hidden_CD.shape[0]) for _ in range(2))
    redo = target_C.new_empty(1, dtype=torch.int32)
    chunk = _Chunk(head, hidden_CD, target_C, softmax, chosen, tiles, total, moment, redo)
    _target(chunk)
    parts = [_Part.of(chunk, block) for block in softmax.blocks]
    make = _specialized if chosen.specialized and _has_gluon() else _plain
    products = [make(part, slope) for part in parts]
    for run in products:
        run(None if gate is None else gate.go)
    if gate is not None:
        gate.wait()
    _sums(chunk, again=False)
    for part in parts:
        _plain(part, slope, peak=True)(redo)
    _peaks(chunk)
    for run in products:
        run(redo)
    _sums(chunk, again=True)


def tile_width(hidden_ND: Tensor, head: Head) -> int:
    """Columns of a tile: where the vocabulary may be cut."""
    return plan(hidden_ND, head.weight_VD, head.softcap is not None).block_n


def _target(chunk: _Chunk) -> None:
    head, softmax, hidden_CD = chunk.head, chunk.softmax, chunk.hidden_CD
    vocabulary, depth = head.weight_VD.shape
    vectors = (head.bias_V, chunk.target_C, softmax.target_x_N, softmax.shift_N, chunk.redo)
    sizes = (vocabulary, depth, hidden_CD.stride(0), head.weight_VD.stride(0))
    constants = (head.softcap is not None, min(2048, triton.next_power_of_2(depth)))
    finish = (float(head.softcap or 0.0), float(head.temperature))
    arguments = (hidden_CD, head.weight_VD, *vectors, *sizes, *finish)
    launch(kernels.target_kernel, (chunk.rows,), arguments, constants, num_warps=4)


@cache
def _has_gluon() -> bool:
    """Whether this Triton has Gluon's names for Hopper, which may still change from release to release."""
    try:
        from ilr_kernels import softmax_product_gluon  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def _specialized(part: _Part, slope: bool) -> Product:
    """The product where groups of warps take roles; it knows no soft-cap, so that `slope` is of no concern."""
    from ilr_kernels import softmax_product_gluon as specialized

    head, softmax, p = part.head, part.chunk.softmax, part.chunk.plan
    descriptors = specialized.operands(part.chunk.hidden_CD, head.weight_VD, part.exps_CV)
    given = (*descriptors, head.bias_V, part.target_C, softmax.shift_N, part.total, part.moment)
    scale = LOG2E / head.temperature
    constants = (softmax.entropy_N is not None, p.group, p.programs, p.stages)

    def run(needed: Tensor | None) -> None:
        kernel, arguments = specialized.specialized_product_kernel, (*given, needed, *part.shape, scale)
        launch(kernel, (part.programs,), arguments, constants, num_warps=4, maxnreg=specialized.REGISTERS)

    return run


def _plain(part: _Part, slope: bool, peak: bool = False) -> Product:
    """The product on any card; with `peak` the rows' largest x takes the place of the sums and nothing is stored."""
    head, softmax, p, hidden_CD = part.head, part.chunk.softmax, part.chunk.plan, part.chunk.hidden_CD
    exps_CV = None if peak else part.exps_CV
    given = (*_operands(p, hidden_CD, head.weight_VD, exps_CV), head.bias_V, part.target_C, softmax.shift_N)
    strides = (hidden_CD.stride(0), head.weight_VD.stride(0), 0 if exps_CV is None else exps_CV.stride(0))
    finish = (LOG2E / head.temperature, float(head.softcap or 0.0))
    moment = softmax.entropy_N is not None and not peak
    tiling = (p.tma, p.flatten, p.halves, not hidden_CD.is_cuda, p.programs, p.block_m, p.block_n, p.block_k, p.group)
    constants = (head.softcap is not None, slope, moment, peak, *tiling)

    def run(needed: Tensor | None) -> None:
        arguments = (*given, part.total, part.moment, needed, *part.shape, *strides, *finish)
        options = {"num_warps": p.warps, "num_stages": p.stages}
        launch(product.product_kernel, (part.programs,), arguments, constants, **options)

    return run


def _operands(chosen: Plan, hidden_CD: Tensor, weight_VD: Tensor, exps_CV: Tensor | None) -> list[object]:
    """hidden, weight and exponentials as the kernel takes them: descriptors for the copy engine, or tensors."""
    operands: list[object] = [hidden_CD, weight_VD, exps_CV]
    if not chosen.tma:
        return operands
    width = chosen.block_n // 2 if chosen.halves else chosen.block_n
    blocks = ([chosen.block_m, chosen.block_k], [chosen.block_n, chosen.block_k], [chosen.block_m, width])
    return [
        None if x is None else TensorDescriptor(x, list(x.shape), list(x.stride()), block)
        for x, block in zip((hidden_CD, weight_VD, exps_CV), blocks, strict=True)
    ]


def _sums(chunk: _Chunk, again: bool) -> None:
    softmax = chunk.softmax
    found = (softmax.target_x_N, softmax.shift_N, softmax.others_N, softmax.logp_N, softmax.entropy_N)
    arguments = (chunk.total, chunk.moment, *found, chunk.redo, chunk.rows, chunk.tiles)
    launch(kernels.sums_kernel, (-(-chunk.rows // 32),), arguments, (again, 32, 32), num_warps=4)


def _peaks(chunk: _Chunk) -> None:
    arguments = (chunk.total, chunk.softmax.shift_N, chunk.softmax.others_N, chunk.redo, chunk.rows, chunk.tiles)
    launch(kernels.peaks_kernel, (-(-chunk.rows // 32),), arguments, (32, 32), num_warps=4)
