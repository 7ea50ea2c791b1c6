"""The gated unit of a transformer's MLP, act(gate) · up: silu (SwiGLU) or gelu_tanh (GeGLU), fused.

out = gated(gate, up, "silu")
gated_backward_(gate, up, dout, "silu")     # gate, up, dout become dgate, dup and out: nothing new is held
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ilr_kernels.backend import on_device, uses_triton
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh")
BLOCK = 1024


def gated(gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor:
    """→ [T, F], not differentiable. Both have the same strides, contiguous rows; computed in float32 or float64.

    The activation is rounded to the inputs' dtype before it is multiplied, as modules of transformers and vLLM do it.
    """
    _check(gate_TF, up_TF, activation)
    if not uses_triton(gate_TF):
        wide = torch.promote_types(gate_TF.dtype, torch.float32)
        return _unit(_activation(gate_TF.to(wide), activation), up_TF)
    from ilr_kernels.gated_kernel import gated_forward_kernel
    from ilr_kernels.launch import launch

    rows, size = gate_TF.shape
    out = torch.empty(rows, size, dtype=gate_TF.dtype, device=gate_TF.device)
    arguments = (gate_TF, up_TF, out, size, gate_TF.stride(0), size)
    with on_device(out):
        launch(gated_forward_kernel, (rows, -(-size // BLOCK)), arguments, (activation, BLOCK), num_warps=4)
    return out


@torch.no_grad()
def gated_backward_(gate_TF: Tensor, up_TF: Tensor, dout_TF: Tensor, activation: str) -> None:
    """Overwrites gate by its gradient, up by its gradient, and dout (contiguous rows) by the output."""
    _check(gate_TF, up_TF, activation)
    if dout_TF.shape != gate_TF.shape or dout_TF.stride(1) != 1:
        raise ValueError(f"dout_TF must be {tuple(gate_TF.shape)} with contiguous rows")
    if not uses_triton(gate_TF):
        wide = torch.promote_types(gate_TF.dtype, torch.float32)
        with torch.enable_grad():
            gate, up = (x.to(wide, copy=True).requires_grad_() for x in (gate_TF, up_TF))
            act = _activation(gate, activation)
            dgate, dup = torch.autograd.grad(act * up, (gate, up), dout_TF.to(wide))
        for target, value in ((dout_TF, _unit(act.detach(), up_TF)), (gate_TF, dgate), (up_TF, dup)):
            target.copy_(value)
        return
    from ilr_kernels.gated_kernel import gated_backward_kernel
    from ilr_kernels.launch import launch

    rows, size = gate_TF.shape
    arguments = (gate_TF, up_TF, dout_TF, size, gate_TF.stride(0), dout_TF.stride(0))
    with on_device(gate_TF):
        launch(gated_backward_kernel, (rows, -(-size // BLOCK)), arguments, (activation, BLOCK), num_warps=4)


def _unit(act_TF: Tensor, up_TF: Tensor) -> Tensor:
    return (act_TF.to(up_TF.dtype).to(act_TF.dtype) * up_TF.to(act_TF.dtype)).to(up_TF.dtype)


def _activation(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def _check(gate_TF: Tensor, up_TF: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if gate_TF.dim() != 2 or gate_TF.shape != up_TF.shape or gate_TF.stride() != up_TF.stride():
        raise ValueError("gate_TF and up_TF must be [T, F] with equal shapes and strides")
    if gate_TF.stride(1) != 1:
        raise ValueError("gate_TF and up_TF must have contiguous rows")
