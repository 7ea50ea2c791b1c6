"""The Triton kernels under Triton's interpreter, in a process of its own (the compiler cannot share it):

TRITON_INTERPRET=1 python tests/kernels_interpret.py     # status 0: everything agrees with float64 truth
"""

from __future__ import annotations

import os

import torch
from ilr_kernels import softmax_product
from ilr_kernels.lm_head_checks import IGNORED
from ilr_kernels.rows import Gate
from ilr_kernels.rows_kernel import count_kernel
from ilr_kernels.sweep import Head
from kernels_cases import (
    SHAPES,
    VARIANTS,
    check_advantage,
    check_logits,
    check_logprob,
    check_overflow,
    check_policy_loss,
    check_with_logp,
    check_within_dweight,
    poisoned,
)
from test_kernels_scale import KINDS
from test_kernels_scale import check as check_kind


def main() -> int:
    """Every variant on one shape, every shape under three variants, and the advantage."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    from ilr_kernels import lm_head_triton

    launched = lm_head_triton.rows_kernel
    assert type(launched).__name__ == "InterpretedFunction", type(launched)
    for name in VARIANTS:
        for dtype in (torch.float32, torch.bfloat16):
            check_policy_loss((13, 24, 101), name, dtype)
    for shape in SHAPES:
        for name in ("ppo off-policy", "everything", "everything by token"):
            check_policy_loss(shape, name, torch.float32)
        check_policy_loss(shape, "ppo", torch.float16, chunk=None)
        check_logprob(shape, torch.float32, softcap=4.0, temperature=0.8)
        check_logprob(shape, torch.bfloat16)
        check_logprob(shape, torch.bfloat16, softcap=4.0, keep_softmax=True)
    for kind in KINDS:
        check_kind(kind, (9, 24, 50), torch.float32, temperature=0.9, softcap=400.0)
    check_overflow((5, 24, 101))
    check_with_logp((33, 24, 101), torch.bfloat16)
    check_within_dweight((40, 64, 101))
    check_logits((7, 333), torch.bfloat16, temperature=0.7)
    for shape in ((1, 1, 1), (1, 4, 8), (2, 3, 5), (3, 2, 16), (5, 3, 33)):
        for calibrate in ("reward", "advantage", "none"):
            for normalize in ("grpo", "dr_grpo", "rloo"):
                check_advantage(shape, calibrate, normalize, masked=shape[1] > 2)
    check_advantage((2, 3, 5), "reward", "grpo", masked=True, dtype=torch.bfloat16)
    check_gate()
    print("all agree")
    return 0


def check_gate() -> None:
    """The product does nothing unless all rows are needed, and the count of rows tells it so."""
    hidden, weight = torch.randn(5, 24).bfloat16(), torch.randn(101, 24).bfloat16()
    target = torch.tensor([0, 100, 7, 7, 50])
    head, go = Head(weight, None, 1.0, None), torch.empty(1, dtype=torch.int32)
    expected = softmax_product.sweep(head, hidden, target, None, None).logp_N

    def counted(target_T: torch.Tensor, factor_T: torch.Tensor | None = None) -> list[int]:
        counts = torch.zeros(3, dtype=torch.int64)
        count_kernel[(1,)](target_T, factor_T, None, counts, go, len(target_T), 101, IGNORED=IGNORED, BLOCK=4)
        return [int(go), *counts.tolist()]

    def gated() -> torch.Tensor:
        with poisoned():
            return softmax_product.sweep(head, hidden, target, None, None, gate=Gate(lambda: None, go)).logp_N

    assert counted(torch.where(target == 7, IGNORED, target)) == [0, 0, 3, 3]
    assert counted(target, torch.tensor([1.0, 0, 1, 1, 1])) == [0, 0, 5, 4]
    assert counted(target + 1) == [0, 1, 5, 5]
    assert gated().isnan().all()
    assert counted(target) == [1, 0, 5, 5]
    assert torch.equal(gated(), expected)


if __name__ == "__main__":
    raise SystemExit(main())
