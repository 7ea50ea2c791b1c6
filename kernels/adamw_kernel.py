"""The Triton kernel of AdamW over many tensors at once: each number is read once, updated in float32, written once."""

import triton
import triton.language as tl


@triton.jit
def stochastically(x, bits):
    """x rounded to bfloat16, up with the probability that leaves its mean in place; `bits` are 16 random bits.

    The largest finite number stays finite, infinities and NaN stay what they are.
    """
    b_x = x.to(tl.uint32, bitcast=True)
    b_up = b_x + bits
    b_up = tl.where((b_up & 0x7F800000) == 0x7F800000, b_x, b_up) & 0xFFFF0000
    rounded = b_up.to(tl.float32, bitcast=True)
    return tl.where(x != x, x, rounded).to(tl.bfloat16)


@triton.jit
def _store(pointer, x, mask, bits, STOCHASTIC: tl.constexpr):
    if STOCHASTIC and pointer.dtype.element_ty == tl.bfloat16:
        tl.store(pointer, stochastically(x, bits), mask=mask)
    else:
        tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _at(p_first, p_units):
    """The address that lies a loaded number of 16 bytes after the first."""
    return p_first + tl.load(p_units) * (128 // p_first.dtype.element_ty.primitive_bitwidth)


@triton.jit(do_not_specialize=["seed"])
def adamw_kernel(
    p_table,  # [6, tensors] int64: weights, gradients, means and squares, in units of 16 bytes from the first of each;
    # numbers of elements, in units of UNIT; and where each begins in the sequence of random numbers
    p_tensor,  # [programs] int32: the tensor that a program works on
    p_first,  # [tensors] int32: the first of its programs
    p_weight,  # the first of each
    p_gradient,
    p_mean,
    p_square,
    tensors,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    correction1,  # 1 / (1 - beta1^step)
    correction2,  # 1 / sqrt(1 - beta2^step)
    scale,  # gradients are multiplied with it
    seed,
    STOCHASTIC: tl.constexpr,
    UNIT: tl.constexpr,  # 16 where all sizes are multiples of it, so that 16 bytes are read at once
    BLOCK: tl.constexpr,
):
    """One program: BLOCK numbers of one tensor."""
    program = tl.program_id(0)
    tensor = tl.load(p_tensor + program)
    block = program - tl.load(p_first + tensor)
    count = tl.load(p_table + 4 * tensors + tensor) * UNIT
    o = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < count
    p_w = _at(p_weight, p_table + tensor) + o
    p_g = _at(p_gradient, p_table + tensors + tensor) + o
    p_m = _at(p_mean, p_table + 2 * tensors + tensor) + o
    p_v = _at(p_square, p_table + 3 * tensors + tensor) + o

    b_g = tl.load(p_g, mask=m, other=0.0).to(tl.float32) * scale
    b_m = tl.load(p_m, mask=m, other=0.0).to(tl.float32)
    b_v = tl.load(p_v, mask=m, other=0.0).to(tl.float32)
    b_w = tl.load(p_w, mask=m, other=0.0).to(tl.float32)
    b_m += (1.0 - beta1) * (b_g - b_m)
    b_v += (1.0 - beta2) * (b_g * b_g - b_v)
    b_w -= lr * weight_decay * b_w
    b_w -= lr * correction1 * b_m / (tl.sqrt_rn(b_v) * correction2 + eps)
    b_low, b_high = 0, 0
    b_other = 0
    if STOCHASTIC:
        b_bits = tl.randint(seed, tl.load(p_table + 5 * tensors + tensor) + o, n_rounds=7).to(tl.uint32)
        b_low, b_high = b_bits & 0xFFFF, b_bits >> 16
        b_other = (b_bits * 2654435769) >> 16  # a third draw, for the squares
    _store(p_w, b_w, m, b_low, STOCHASTIC)
    _store(p_m, b_m, m, b_high, STOCHASTIC)
    _store(p_v, b_v, m, b_other, STOCHASTIC)
