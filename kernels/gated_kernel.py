"""The Triton kernels of a gated unit: act(gate) · up, and its gradients in place of what they are made from."""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activation(b_g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)) in float32."""
    if ACTIVATION == "silu":
        b_s = tl.sigmoid(b_g)
        return b_g * b_s, b_s * (1.0 + b_g * (1.0 - b_s))
    b_in = 0.7978845608028654 * b_g * (1.0 + 0.044715 * b_g * b_g)  # gelu's approximation by tanh
    b_t = _tanh(b_in)
    b_slope = 0.7978845608028654 * (1.0 + 0.134145 * b_g * b_g)
    return 0.5 * b_g * (1.0 + b_t), 0.5 * (1.0 + b_t) + 0.5 * b_g * (1.0 - b_t * b_t) * b_slope


@triton.jit
def _unit(b_a, b_u, dtype: tl.constexpr):
    """The activation is rounded before the product, as in transformers' modules and in vLLM."""
    return (b_a.to(dtype).to(tl.float32) * b_u).to(dtype)


@triton.jit
def gated_forward_kernel(
    p_gate, p_up, p_out, size, stride, out_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: BLOCK numbers of a row."""
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_g = tl.load(p_gate + row * stride + o, mask=m, other=0.0).to(tl.float32)
    b_u = tl.load(p_up + row * stride + o, mask=m, other=0.0).to(tl.float32)
    b_a, _ = activation(b_g, ACTIVATION)
    tl.store(p_out + row * out_stride + o, _unit(b_a, b_u, p_out.dtype.element_ty), mask=m)


@triton.jit
def gated_backward_kernel(
    p_gate,  # becomes dgate
    p_up,  # becomes dup
    p_dout,  # becomes the output
    size,
    stride,
    out_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK numbers of a row."""
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    p_g, p_u, p_d = p_gate + row * stride + o, p_up + row * stride + o, p_dout + row * out_stride + o
    b_g = tl.load(p_g, mask=m, other=0.0).to(tl.float32)
    b_u = tl.load(p_u, mask=m, other=0.0).to(tl.float32)
    b_d = tl.load(p_d, mask=m, other=0.0).to(tl.float32)
    b_a, b_slope = activation(b_g, ACTIVATION)
    tl.store(p_g, (b_d * b_u * b_slope).to(p_gate.dtype.element_ty), mask=m)
    tl.store(p_u, (b_d * b_a).to(p_up.dtype.element_ty), mask=m)
    tl.store(p_d, _unit(b_a, b_u, p_dout.dtype.element_ty), mask=m)
