"""The shapes that others publish: Liger's CuTe cross-entropy, TRL's issue 7244, RL-Kernel's table, given logits; and
log-probs of few rows, as a sampler asks for them at every token.

    ilr-fast bench lm_head_shapes

The limit is three whole products of the same work, or for given logits one read at the bandwidth of a copy of them.
"""

from __future__ import annotations

from typing import Any

import torch
from ilr_benchmarks import host
from ilr_benchmarks.lm_head import ADDED, BONUS, GRPO, LIMIT, OURS, Products, Truth, loss, make, name_of, release
from ilr_benchmarks.measure import Case, Outputs, Target, measure, relative_error
from ilr_benchmarks.problem import Problem, logprob_truth, policy_truth
from ilr_kernels import reference
from ilr_kernels.lm_head import linear_logprob, logits_logprob
from torch import Tensor

LOSS_SHAPES = ((8192, 4096, 131072, 1.06, None), (8192, 4096, 151936, 1.05, 2.2))
LOGPROB_SHAPE, LOGITS_SHAPE, QUICK = (4096, 2048, 131072), (8192, 151936), (64, 32, 1000)
FEW_SHAPE, FEW = (512, 896, 151936), (1, 32, 256, 512)
COPY = "copy of the logits"


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> list[dict[str, Any]]:
    """Rows of all five."""
    rows = []
    for n, d, v, bound, gib in LOSS_SHAPES[:1] if quick else LOSS_SHAPES:
        x = make(QUICK if quick else (n, d, v), device)
        rows += measure(loss_cases(x, bound, gib), name_of(x), rounds, device, queued=True)
        del x
        release(device)
    x = make(QUICK if quick else LOGPROB_SHAPE, device)
    rows += measure(logprob_cases(x), name_of(x), rounds, device, queued=True)
    del x
    release(device)
    x = make(QUICK if quick else FEW_SHAPE, device)
    rows += few_rows(x, rounds, device)
    n, v = (64, 1000) if quick else LOGITS_SHAPE
    torch.manual_seed(0)
    logits_TV = (2 * torch.randn(n, v, device=device)).to(x.hidden_ND.dtype)
    del x
    release(device)
    target_T = torch.randint(v, (n,), device=device)
    rows += measure(logits_cases(logits_TV, target_T), f"N={n} V={v} given logits", rounds, device, queued=True)
    return rows


def loss_cases(x: Problem, bound: float, gib: float | None) -> list[Case]:
    """The loss's variants at one shape."""
    truth = Truth(x, GRPO, policy_truth)
    buffer_VD = torch.zeros_like(x.weight_VD, requires_grad=False)
    targets = (Target("limit", bound), *([] if gib is None else [Target("gib", gib)]))
    added = (Target("share", bound, ADDED), *targets[1:])
    products = Products(x)
    work = lambda: loss(x, weight_grad_VD=buffer_VD)  # noqa: E731
    return [
        Case(LIMIT, products.whole),
        Case(ADDED, products.added, limit=LIMIT),
        Case(OURS, lambda: loss(x), truth.error(), limit=LIMIT, targets=targets),
        Case("ours, into a gradient of the weight's dtype", work, truth.error(), limit=LIMIT, targets=added,
             prepare=buffer_VD.zero_),
        Case("ours, entropy_coef=0.01", lambda: loss(x, loss=BONUS), Truth(x, BONUS).error(), limit=LIMIT),
    ]  # fmt: skip


def logprob_cases(x: Problem) -> list[Case]:
    """The log-probs' variants at one shape."""
    truth = Truth(x, GRPO, lambda y, _: logprob_truth(y))
    target = (Target("limit", 1.15),)
    return [
        Case(LIMIT, Products(x).whole),
        Case("ours, linear_logprob(keep_softmax=True)", lambda: logprob(x, True), truth.error(), limit=LIMIT,
             targets=target),
        Case("ours, linear_logprob", lambda: logprob(x, False), truth.error(), limit=LIMIT),
    ]  # fmt: skip


def logprob(x: Problem, keep_softmax: bool) -> Outputs:
    x.forget()
    logp_N = linear_logprob(x.hidden_ND, x.weight_VD, x.target_N, keep_softmax=keep_softmax)
    assert isinstance(logp_N, Tensor)
    logp_N.backward(x.advantage_N)
    found = {"logp": logp_N.detach(), "dhidden": x.hidden_ND.grad, "dweight": x.weight_VD.grad}
    x.forget()
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def few_rows(x: Problem, rounds: int, device: str) -> list[dict[str, Any]]:
    """Log-probs and the loss of the first rows, beside their products; on the host, a whole call from an idle GPU."""
    sizes = [n for n in FEW if n <= len(x.target_N)]
    found, works = [], {}
    for n in sizes:
        y = x.first(n)
        products, truth = Products(y), Truth(y, GRPO)
        one, three = f"limit: one product, N={n}", f"limit: three products, N={n}"
        alone, whole = f"ours, linear_logprob alone, N={n}", f"ours, loss alone, N={n}"
        works[alone] = lambda y=y: logprob_alone(y)
        works[whole] = lambda y=y: loss(y)
        found += [
            Case(one, products.one),
            Case(alone, works[alone], truth.error(), limit=one),
            Case(three, products.whole),
            Case(whole, works[whole], truth.error(), limit=three),
        ]
    rows = measure(found, f"N={sizes[0]} to {sizes[-1]} {name_of(x).partition(' ')[2]}", rounds, device, queued=True)
    checked = {row["variant"]: row for row in rows}
    return rows + [host.whole_call_row(name, work, checked[name], device) for name, work in works.items()]


@torch.no_grad()
def logprob_alone(x: Problem) -> Outputs:
    logp_N = linear_logprob(x.hidden_ND, x.weight_VD, x.target_N)
    assert isinstance(logp_N, Tensor)
    return {"logp": logp_N}


def logits_cases(logits_TV: Tensor, target_T: Tensor) -> list[Case]:
    """A copy reads and writes: half its time is one read at its bandwidth."""
    copy_TV = torch.empty_like(logits_TV)

    def error(found: tuple[Tensor, Tensor]) -> dict[str, float]:
        parts = [slice(start, start + 512) for start in range(0, len(target_T), 512)]
        exact = [reference.logits_logprob(logits_TV[p].double(), target_T[p], with_entropy=True) for p in parts]
        whole = (torch.cat(tensors) for tensors in zip(*exact, strict=True))
        return {name: relative_error(a, b) for name, a, b in zip(("logp", "entropy"), found, whole, strict=True)}

    return [
        Case(COPY, lambda: copy_TV.copy_(logits_TV)),
        Case("ours, logits_logprob with entropy", lambda: logits_logprob(logits_TV, target_T, with_entropy=True), error,
             tolerance=1e-4, limit=COPY, limit_scale=0.5, targets=(Target("limit", 1.15),)),
    ]  # fmt: skip
