"""The loss with both gradients on the CPU; the table of `test_lm_head.py`, as a benchmark of the command line.

    ilr-fast bench lm_head_cpu
"""

from __future__ import annotations

from typing import Any

import torch
from ilr_benchmarks.lm_head import GRPO, LIMIT, Products, Truth, loss
from ilr_benchmarks.measure import Case, measure
from ilr_benchmarks.problem import Problem
from ilr_kernels import reference

SHAPE, QUICK = (512, 640, 262144), (64, 32, 1000)


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> list[dict[str, Any]]:
    """Rows; `products_share` is the limit's part of each variant's time."""
    n, d, v = QUICK if quick else SHAPE
    x = Problem.make(n, d, v, device, torch.float32)
    truth = Truth(x, GRPO)
    buffer_VD = torch.zeros_like(x.weight_VD, requires_grad=False)
    cases = [
        Case(LIMIT, Products(x).whole),
        Case("ours, new dweight", lambda: loss(x), truth.error(), tolerance=1e-4, limit=LIMIT),
        Case("ours, into the weight's gradient", lambda: loss(x, weight_grad_VD=buffer_VD), truth.error(),
             tolerance=1e-4, limit=LIMIT, prepare=buffer_VD.zero_),
    ]  # fmt: skip
    if not only_ours:
        cases.append(Case("plain PyTorch, whole logits", lambda: loss(x, reference), truth.error(), 1e-4, LIMIT))
    rows = measure(cases, f"N={n} D={d} V={v} float32", min(rounds, 3), device)
    for row in rows:
        row["products_share"] = 1 / row["over_limit"] if row["over_limit"] else None
    return rows
