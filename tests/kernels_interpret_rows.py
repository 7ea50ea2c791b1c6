"""What a kernel is compiled for must not depend on the number of rows: under Triton's interpreter, in a process of
its own.

TRITON_INTERPRET=1 python tests/kernels_interpret_rows.py     # status 0: one kind of arguments a kernel

In training every micro-batch has another number of rows. Triton compiles a kernel for each combination of pointers at
multiples of 16 bytes and others, and of integers that are 1, multiples of 16 and others, unless it is told not to.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import torch
from ilr_kernels import launch, lm_head_triton, softmax_fill, softmax_product, stats_triton
from ilr_kernels.lm_head import linear_policy_loss
from ilr_kernels.norm import rms_norm
from ilr_kernels.policy_loss import PolicyLoss
from torch import Tensor

ROWS = (32, 33, 34, 35, 48, 49)
EXPECTED = {
    torch.bfloat16: {"target_kernel", "product_kernel", "sums_kernel", "factors_kernel", "norm_backward_kernel"},
    torch.float32: {"rows_kernel", "stats_kernel", "norm_forward_kernel"},
}
LAUNCHES = {"product_kernel": 3, "sums_kernel": 2}  # at first; for the peaks, and again, where a sum overflowed
LOOSE = "do_not_specialize_on_alignment"
Seen = dict[str, set[tuple]]  # by kernel, the kinds of arguments and the constants


def main() -> int:
    """Runs the loss and a norm over different numbers of rows; AssertionError names what would be compiled again."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    for dtype, expected in EXPECTED.items():
        for loss in (PolicyLoss(importance="token"), PolicyLoss(entropy_coef=0.1)):
            seen = launched(dtype, loss)
            several = {name: kinds for name, kinds in seen.items() if len(kinds) > LAUNCHES.get(name, 1)}
            assert not several, several
            assert expected <= seen.keys(), seen.keys()
    print("all agree")
    return 0


def launched(dtype: torch.dtype, loss: PolicyLoss) -> Seen:
    """What is launched for every number of rows."""
    seen: Seen = defaultdict(set)
    real = launch.launch

    def spy(kernel: Any, grid: tuple, arguments: tuple, constants: tuple, **options: Any) -> None:
        free, loose = (set(kernel.kwargs.get(key) or ()) for key in ("do_not_specialize", LOOSE))
        names = kernel.arg_names[: len(arguments)]
        kinds = [_kind(x, n in free, n in free | loose) for n, x in zip(names, arguments, strict=True)]
        seen[kernel.fn.__name__].add((*kinds, constants))
        real(kernel, grid, arguments, constants, **options)

    places = (launch, lm_head_triton, softmax_fill, softmax_product, stats_triton)
    weight = (torch.randn(101, 32) / 6).to(dtype)
    for place in places:
        place.launch = spy  # type: ignore[attr-defined]
    try:
        for rows in ROWS:
            _step(rows, weight, loss)
    finally:
        for place in places:
            place.launch = real  # type: ignore[attr-defined]
    return seen


def _kind(x: Any, free: bool, loose: bool) -> Any:
    """What Triton compiles an argument for."""
    if isinstance(x, Tensor):
        return x.dtype, loose or x.data_ptr() % 16 == 0
    if type(x) is int:
        return int if free else (x == 1, loose or x % 16 == 0)
    return type(x)


def _step(rows: int, weight_VD: Tensor, loss: PolicyLoss) -> None:
    """A norm and the policy loss, forward and backward."""
    hidden = torch.randn(rows, weight_VD.shape[1]).to(weight_VD.dtype).requires_grad_()
    scale = torch.ones_like(weight_VD[0]).requires_grad_()
    value, _ = linear_policy_loss(
        rms_norm(hidden, scale, 1e-6),
        weight_VD,
        torch.randint(weight_VD.shape[0], (rows,)),
        torch.randn(rows),
        torch.full((rows,), 1 / rows),
        loss=loss,
        behavior_logp_T=torch.full((rows,), -4.0) if loss.importance != "none" else None,
        weight_grad_VD=torch.zeros(weight_VD.shape),
    )
    value.backward()


if __name__ == "__main__":
    raise SystemExit(main())
