"""Flash attention over a packed forest: every branch sees its stem, every stem stands once, gradients are exact.

torch's variable-length flash kernel aligns causal attention at the last key, so that a run of queries can have more
keys than queries: those before it. A node of the forest (tree_plan.py) is such a run, and its keys are the rows of its
ancestors, then its own. Keys and values of stems are gathered once for every node below them, small copies beside the
query; their gradients are added up again in float32, in a fixed order. Positions along gathered keys are those of the
sequence, so a sliding window is the kernel's own.

    query rows       stem │ branch 0 │ branch 1                 stem │ branch 0 │ branch 1
    their keys       stem │ stem, branch 0 │ stem, branch 1     gathered: rows_K

    if usable(plan, query_THD, settings):
        output_THD = flash_attention(query_THD, key_TKD, value_TKD, plan.segments(device), scale, window)
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ilr_fast.segments import Segments
from ilr_fast.tree_plan import TreePlan, tree_plan

CHECK_TOLERANCE = 0.02  # relative error of bfloat16 results


class RaggedKernel(Protocol):
    """Attention of runs of queries, each to a run of keys, causal and aligned at the last key."""

    most_gathered: float  # key rows for each query row; beyond it masks over blocks copy less

    def forward(
        self, q_THD: Tensor, k_NKD: Tensor, v_NKD: Tensor, segments: Segments, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor, Any]:
        """→ output [T, H, D], log-sum-exp of the scores, and what else backward wants."""
        ...

    def backward(
        self, gradient_THD: Tensor, q_THD: Tensor, k_NKD: Tensor, v_NKD: Tensor, out_THD: Tensor, lse: Tensor,
        state: Any, segments: Segments, scale: float, window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """→ gradients of q, k and v."""
        ...


class TorchFlash:
    """The kernel inside torch, in half precision on CUDA."""

    most_gathered: float = 8

    def forward(self, q_THD, k_NKD, v_NKD, segments, scale, window):  # type: ignore[no-untyped-def]
        """See RaggedKernel."""
        out, lse, state, _, _ = torch.ops.aten._flash_attention_forward(
            q_THD, k_NKD, v_NKD, segments.starts_q, segments.starts_k, segments.longest_q, segments.longest_k,
            0.0, window is None, False, scale=scale, **_window(window),
        )  # fmt: skip
        return out, lse, state

    def backward(self, gradient_THD, q_THD, k_NKD, v_NKD, out_THD, lse, state, segments, scale, window):  # type: ignore[no-untyped-def]
        """See RaggedKernel."""
        return torch.ops.aten._flash_attention_backward(
            gradient_THD, q_THD, k_NKD, v_NKD, out_THD, lse, segments.starts_q, segments.starts_k,
            segments.longest_q, segments.longest_k, 0.0, window is None, state,
            torch.empty(0, device=q_THD.device), scale=scale, **_window(window),
        )  # fmt: skip


def torch_kernel() -> RaggedKernel:
    """What runs where nothing else is asked for."""
    return TorchFlash()


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def flash_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    segments: Segments,
    scale: float,
    window: int | None = None,
    kernel: RaggedKernel | None = None,
) -> Tensor:
    """Attention of T packed rows, heads H a multiple of K, differentiable once → [T, H, D].

    A row sees its ancestors and itself, with a `window` those less than `window` positions back.
    """
    return _Flash.apply(q_THD, k_TKD, v_TKD, segments, scale, window, kernel or torch_kernel())


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THD, k_TKD, v_TKD, segments, scale, window, kernel):  # type: ignore[no-untyped-def]
        out, lse, state = kernel.forward(q_THD, segments.gather(k_TKD), segments.gather(v_TKD), segments, scale, window)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out, lse)
        ctx.rest = segments, scale, window, kernel, state
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient_THD):  # type: ignore[no-untyped-def]
        q_THD, k_TKD, v_TKD, out, lse = ctx.saved_tensors
        segments, scale, window, kernel, state = ctx.rest
        k_NKD, v_NKD = segments.gather(k_TKD), segments.gather(v_TKD)
        dq, dk_NKD, dv_NKD = kernel.backward(
            gradient_THD, q_THD, k_NKD, v_NKD, out, lse, state, segments, scale, window
        )
        return dq, *segments.add_up(dk_NKD, dv_NKD), None, None, None, None


def usable(
    plan: TreePlan,
    x: Tensor,
    size: int,
    softcap: float | None,
    dropout: float,
    kernel: RaggedKernel | None = None,
) -> bool:
    """Whether the kernel fits for training: as `kernel_fits`, and stems that are not copied too often.

    `x` has the queries' device and dtype, `size` is the size of a head.
    """
    most = (kernel or torch_kernel()).most_gathered * plan.tokens
    return plan.gathered <= most and kernel_fits(x, size, softcap, dropout)


def kernel_fits(x: Tensor, size: int, softcap: float | None, dropout: float) -> bool:
    """Whether torch's kernel runs here: half precision on CUDA, no soft-cap, no dropout, a size of heads that it knows.

    The first call for a device and head size compares it with a softmax written out.
    """
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if softcap is not None or dropout != 0 or size % 8 or size > 256:
        return False
    if size > 192 and torch.cuda.get_device_capability(x.device) not in ((8, 0), (9, 0), (10, 0)):
        return False  # its backward pass needs more shared memory than these cards have
    return _agrees(x.device, x.dtype, size)


@cache
def _agrees(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether the kernel of this torch computes what is written here; a warning where it does not."""
    try:
        with ThreadPoolExecutor(1) as aside:  # whose autograd has none of the hooks that checkpointing sets here
            errors = {f"window {w}": aside.submit(check, device, dtype, size, w).result() for w in (None, 5)}
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except (RuntimeError, AttributeError, TypeError) as problem:
        errors = {str(problem).splitlines()[0]: float("inf")}
    wrong = {name: error for name, error in errors.items() if not error < CHECK_TOLERANCE}
    if wrong:
        warnings.warn(f"torch's flash attention can't be used here ({wrong}): slower masks instead", stacklevel=2)
    return not wrong


@torch.enable_grad()
def check(
    device: torch.device, dtype: torch.dtype, size: int, window: int | None, kernel: RaggedKernel | None = None
) -> float:
    """The largest relative error of output and gradients on a small forest, against a softmax in float32."""
    plan = tree_plan([(17, [9, 1, 70]), (0, [5]), (3, [2, 130])])
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(plan.tokens, 4, size), (plan.tokens, 2, size), (plan.tokens, 2, size), (plan.tokens, 4, size)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    results = []
    for which, flash in ((dtype, True), (wide, False)):
        q, k, v = (x.detach().to(which, copy=True).requires_grad_() for x in inputs[:3])
        if flash:
            out = flash_attention(q, k, v, plan.segments(device), size**-0.5, window, kernel)
        else:
            out = _written_out(q, k, v, plan, size**-0.5, window)
        out.backward(inputs[3].to(which))
        results.append([x.detach().to(wide) for x in (out, q.grad, k.grad, v.grad) if x is not None])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def _written_out(q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, scale: float, window: int | None) -> Tensor:
    seen_TT = torch.from_numpy(plan.seen(window)).to(q.device)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(~seen_TT, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)
