"""`product_kernel` for Hopper: one group of warps takes its exponentials while another multiplies and a warp loads.

Formulas and outputs are those of `softmax_product_kernel.py`. There all warps of a program finish a tile together, and
the tensor cores rest while exponentials are taken: 1.5 µs beside 11 µs of products at D = 896. Here a tile's upper and
lower 64 rows belong to two groups of four warps that never wait for each other. A third group's one warp loads stages
of hidden states and weights ahead of both; a stage is free when both have read it. So one group may run ahead by the
stages there are, and multiplies at full speed while the other takes exponentials.

Gluon is Triton's own language below Triton; it names layouts, barriers and warps. Needs compute capability 9.0.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.6 calls them copies, later releases loads and stores.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

HALF_M = gl.constexpr(64)  # rows of one group of warps
BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(64)
PIECE_N = gl.constexpr(64)  # columns finished and stored at once
STAGE_BYTES = gl.constexpr((128 + 256) * 64 * 2)
REGISTERS = 168  # a thread at launch; the groups then share them out: 240 for each that multiplies, 24 for the loader
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def operands(hidden_CD: Any, weight_VD: Any, exps_CV: Any | None) -> list[TensorDescriptor | None]:
    """Descriptors for the copy engine of hidden states, weights and, where they are stored, exponentials."""
    blocks = ([64, 64], [256, 64], [64, 64])
    return [
        None if x is None else TensorDescriptor(x, list(x.shape), list(x.stride()), block, LAYOUT)
        for x, block in zip((hidden_CD, weight_VD, exps_CV), blocks, strict=True)
    ]


@gluon.jit
def _corner(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """A tile's first row and column; GROUP tiles of rows share the weights of one pass."""
    band = tile // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)
    within = tile - band * GROUP * tiles_n
    return (band * GROUP + within % height) * BLOCK_M, (within // height) * BLOCK_N


@gluon.jit
def _load(hidden, weight, a, b, full, empty, tiles, tiles_m, tiles_n, depth,
          GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The loading warp: fills every stage as soon as both groups have read it."""
    stage, phase = 0, 1
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        m, n = _corner(tile, tiles_m, tiles_n, GROUP)
        for k in range(0, depth, BLOCK_K):
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(ready, STAGE_BYTES)
            async_load(hidden, [m, k], ready, a.index(2 * stage))
            async_load(hidden, [m + HALF_M, k], ready, a.index(2 * stage + 1))
            async_load(weight, [n, k], ready, b.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _finish(b_logit, exps, pieces, p_bias, b_shift, b_local, m, n, left, scale, HALF: gl.constexpr,
            layout: gl.constexpr, MASK: gl.constexpr, MOMENT: gl.constexpr):  # fmt: skip
    """(Σ e, Σ e (x − c)) of a group's 64 rows of a tile, finished and stored in four pieces.

    No branch parts the pieces, so that other arithmetic fills the time that exponentials take. Sums are the same in
    bits with and without MASK and whatever is stored: multiply-adds are spelled out, the compiler has no choice.
    """
    halves = b_logit.reshape([HALF_M, 2, 2 * PIECE_N]).permute([0, 2, 1]).split()
    for q in gl.static_range(4):
        start = q * PIECE_N
        pair = halves[q // 2].reshape([HALF_M, 2, PIECE_N]).permute([0, 2, 1]).split()
        b_y = gl.convert_layout(pair[q % 2], layout)
        o_n = start + gl.arange(0, PIECE_N, layout=gl.SliceLayout(0, layout))
        if p_bias is not None:
            b_y += gl.load(p_bias + n + o_n, mask=o_n < left, other=0.0).to(gl.float32)[None, :]
        b_y = b_y * scale - b_shift[:, None]
        b_e = gl.exp2(b_y)
        if MASK:  # a target's column is here, or the vocabulary's end
            b_e = gl.where((o_n[None, :] == b_local[:, None]) | (o_n[None, :] >= left), 0.0, b_e)
        if q == 0:
            b_sum, b_part = b_e, b_e * b_y
        else:
            b_sum += b_e
            b_part = gl.fma(b_e, b_y, b_part)
        if exps is not None:
            buffer = pieces.index(2 * HALF + q % 2)
            tma.store_wait(1)
            buffer.store(b_e.to(gl.bfloat16))
            fence_async_shared()
            async_store(exps, [m, n + start], buffer)
    b_moment = gl.zeros_like(b_shift)
    if MOMENT:
        b_moment = gl.sum(b_part, 1)
    return gl.sum(b_sum, 1), b_moment


@gluon.jit
def _multiply(exps, p_bias, p_target, p_shift, p_total, p_moment, a, b, pieces, full, empty,
              rows, vocabulary, depth, tiles, tiles_m, tiles_n, scale, HALF: gl.constexpr, MOMENT: gl.constexpr,
              GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """One group of four warps: the products of its 64 rows of every tile, and their exponentials and sums.

    The tensor cores have nothing of this group between a tile's last product and the next one's first, so that only
    exponentials stand there: a tile's place, shifts and targets are found while its first product is made.
    """
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    piece: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, piece)
    stage, phase = 0, 0
    for tile in range(gl.program_id(0), tiles, PROGRAMS):
        mbarrier.wait(full.index(stage), phase)
        nothing = gl.zeros([HALF_M, BLOCK_N], gl.float32, whole)
        acc = warpgroup_mma(a.index(2 * stage + HALF), b.index(stage).permute((1, 0)), nothing, is_async=True)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        m, n = _corner(tile, tiles_m, tiles_n, GROUP)
        m += HALF * HALF_M
        o_m = m + gl.arange(0, HALF_M, layout=by_row)
        m_m = o_m < rows
        b_shift = gl.load(p_shift + o_m, mask=m_m, other=0.0)
        b_local = gl.load(p_target + o_m, mask=m_m, other=-1).to(gl.int32) - n
        left = vocabulary - n

        for _ in range(BLOCK_K, depth, BLOCK_K):
            mbarrier.wait(full.index(stage), phase)
            acc = warpgroup_mma(a.index(2 * stage + HALF), b.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        inside = (left < BLOCK_N) | (gl.max(((b_local >= 0) & (b_local < BLOCK_N)).to(gl.int32), 0) > 0)
        b_logit = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES))

        if inside:
            b_total, b_moment = _finish(b_logit, exps, pieces, p_bias, b_shift, b_local, m, n, left, scale, HALF,
                                        piece, True, MOMENT)  # fmt: skip
        else:
            b_total, b_moment = _finish(b_logit, exps, pieces, p_bias, b_shift, b_local, m, n, left, scale, HALF,
                                        piece, False, MOMENT)  # fmt: skip
        o = (n // BLOCK_N) * rows + o_m
        gl.store(p_total + o, b_total, mask=m_m)
        if MOMENT:
            gl.store(p_moment + o, b_moment, mask=m_m)
    if exps is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["p_total", "p_moment"])
def specialized_product_kernel(
    hidden,  # TMA descriptors of [rows, D], [V, D] and, unless nothing is stored, [rows, V]
    weight,
    exps,
    p_bias,
    p_target,
    p_shift,
    p_total,  # [tiles of the vocabulary, rows]
    p_moment,
    p_needed,  # whether the launch is, None: it is
    rows,
    vocabulary,
    depth,
    scale,  # log2 e / temperature
    MOMENT: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A persistent program takes every PROGRAMS-th tile of 128 rows and 256 columns."""
    needed = 1
    if p_needed is not None:
        needed = gl.load(p_needed)
    tiles_m, tiles_n = gl.cdiv(rows, BLOCK_M), gl.cdiv(vocabulary, BLOCK_N)
    tiles = tiles_m * tiles_n * needed
    a = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, HALF_M, BLOCK_K], hidden.layout)
    b = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    pieces = a
    if exps is not None:
        pieces = gl.allocate_shared_memory(gl.bfloat16, [4, HALF_M, PIECE_N], exps.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    gl.warp_specialize([
        (_multiply, (exps, p_bias, p_target, p_shift, p_total, p_moment, a, b, pieces, full, empty, rows, vocabulary,
                     depth, tiles, tiles_m, tiles_n, scale, 0, MOMENT, GROUP, PROGRAMS, STAGES)),
        (_multiply, (exps, p_bias, p_target, p_shift, p_total, p_moment, a, b, pieces, full, empty, rows, vocabulary,
                     depth, tiles, tiles_m, tiles_n, scale, 1, MOMENT, GROUP, PROGRAMS, STAGES)),
        (_load, (hidden, weight, a, b, full, empty, tiles, tiles_m, tiles_n, depth, GROUP, PROGRAMS, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip
