"""The policy loss over the vocabulary with both gradients, beside its three cuBLAS products, plain PyTorch and peers.

    ilr-fast bench lm_head            # N = 16,384, bf16, one NVIDIA GPU; writes benchmarks/results/lm_head.json

The limit is logits, dhidden and dweight as three whole products, in the same interleaved run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ilr_benchmarks import peers
from ilr_benchmarks.measure import Case, Outputs, Target, measure, relative_error
from ilr_benchmarks.problem import Problem, policy_truth
from ilr_kernels import reference
from ilr_kernels.lm_head import linear_logprob, linear_policy_loss
from ilr_kernels.policy_loss import PolicyLoss
from torch import Tensor

SHAPES = ((16384, 4096, 128256), (16384, 896, 151936))
QUICK = ((64, 32, 1000),)
SMALL_CHUNK = 1024
GRPO, GSPO, BONUS = PolicyLoss(), PolicyLoss(ratio="sequence"), PolicyLoss(entropy_coef=0.01)
LIMIT, ONE, OURS = "limit: three whole products", "limit: one product", "ours, new dweight"
# targets by hidden size: (4096, 896)
T = {"loss": (1.05, 1.20), "exact": (1.18, 1.45), "liger": (12, 25), "cce": (4, 3.3), "gib": (2.2, 1.5), 
     "half": (0.56, 0.58), "half_all": (0.72, 0.74), "frozen": (0.72, 0.72), "forward": (1.10, 1.20)}  # fmt: skip


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> list[dict[str, Any]]:
    """Rows of both shapes."""
    rows = []
    for n, d, v in QUICK if quick else SHAPES:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        x = Problem.make(n, d, v, device, dtype)
        shape = f"N={n} D={d} V={v} {str(dtype).removeprefix('torch.')}"
        rows += measure(cases(x, 0 if d > 2048 or quick else 1, only_ours), shape, rounds, device)
        del x
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def cases(x: Problem, column: int, only_ours: bool) -> list[Case]:
    """All variants; those that share a truth stand together, since only one truth is held."""
    t = {name: pair[column] for name, pair in T.items()}
    zero = x.half_zero()
    base, zeros, bonus, gspo = (Truth(p, loss) for p, loss in ((x, GRPO), (zero, GRPO), (x, BONUS), (x, GSPO)))
    products = Products(x)
    buffer_VD = torch.zeros_like(x.weight_VD, requires_grad=False)
    exact_VD = torch.zeros_like(buffer_VD, dtype=torch.float32)
    live = zero.advantage_N != 0
    against = () if only_ours else tuple(
        Target("faster", t[key], name) for key, name in (("liger", "Liger"), ("cce", "cut-cross-entropy"))
    )
    small = (Target("gib", 0.6), Target("limit", 1.25)) if column == 0 else ()

    def ours(name: str, truth: Truth, work: Callable[[], Outputs], *targets: Target, keep: Tensor | None = None,
             buffer: Tensor | None = None) -> Case:  # fmt: skip
        prepare = None if buffer is None else buffer.zero_
        return Case(name, work, truth.error(keep), limit=LIMIT, targets=targets, prepare=prepare)

    found = [
        Case(LIMIT, products.whole),
        Case("limit in chunks of 2048", products.chunked, limit=LIMIT),
        Case(ONE, products.one),
        Case("ours, linear_logprob with entropy, forward", lambda: forward(x), base.error(), limit=ONE,
             targets=(Target("limit", t["forward"]),)),
        ours(OURS, base, lambda: loss(x), Target("limit", t["loss"]), *against),
        ours("ours, into a gradient of the weight's dtype", base, lambda: loss(x, weight_grad_VD=buffer_VD),
             Target("limit", t["loss"]), Target("gib", t["gib"]), buffer=buffer_VD),
        ours("ours, into a float32 gradient", base, lambda: loss(x, weight_grad_VD=exact_VD),
             Target("limit", t["exact"]), Target("gib", 3.5), buffer=exact_VD),
        ours(f"ours, chunk={SMALL_CHUNK}", base,
             lambda: loss(x, weight_grad_VD=buffer_VD, chunk=SMALL_CHUNK), *small, buffer=buffer_VD),
        ours("ours, frozen head", base, lambda: loss(x, frozen=True), Target("share", t["frozen"], OURS)),
    ]  # fmt: skip
    if not only_ours:
        others = [("plain PyTorch, whole logits", lambda: loss(x, reference), 3), *peers.works(x)]
        for name, work, most in others:
            found.append(Case(name, work, base.error(), tolerance=0.1, limit=LIMIT, most_rounds=most))
    return [
        *found,
        ours("ours, half of the rows without advantage", zeros, lambda: loss(zero), Target("share", t["half"], OURS),
             keep=live),
        ours("ours, half without advantage, with_logp", zeros, lambda: loss(zero, with_logp=True),
             Target("share", t["half_all"], OURS)),
        ours("ours, entropy_coef=0.01", bonus, lambda: loss(x, loss=BONUS)),
        ours("ours, ratio=sequence (GSPO)", gspo, lambda: loss(x, loss=GSPO), Target("share", 1.45, OURS)),
    ]  # fmt: skip


class Truth:
    """The float64 truth of a problem, made when first asked for; only the newest is held."""

    held: tuple[Truth, Outputs] | None = None

    def __init__(self, x: Problem, loss: PolicyLoss, make: Callable[[Problem, PolicyLoss], Outputs] = policy_truth):
        self.x, self.loss, self.make = x, loss, make

    def error(self, keep_N: Tensor | None = None) -> Callable[[Outputs], float]:
        """The largest relative error of what a variant returns; of log-probs in the rows of keep_N alone."""

        def largest(found: Outputs) -> float:
            if Truth.held is None or Truth.held[0] is not self:
                Truth.held = None
                Truth.held = self, self.make(self.x, self.loss)
            errors = []
            for name, tensor in found.items():
                exact = Truth.held[1][name]
                cut = keep_N is not None and name == "logp"
                errors.append(relative_error(tensor[keep_N] if cut else tensor, exact[keep_N] if cut else exact))
            return max(errors) if all(e == e for e in errors) else float("nan")

        return largest


class Products:
    """The limit: the same three products and nothing else, their outputs allocated before."""

    def __init__(self, x: Problem):
        self.h, self.w = x.hidden_ND.detach(), x.weight_VD.detach()
        self.logits = torch.empty(len(self.h), len(self.w), device=self.h.device, dtype=self.h.dtype)
        self.g = torch.randn_like(self.logits)
        self.dh, self.dw = torch.empty_like(self.h), torch.zeros_like(self.w)

    def one(self) -> None:
        torch.mm(self.h, self.w.t(), out=self.logits)

    def whole(self) -> None:
        self.one()
        torch.mm(self.g, self.w, out=self.dh)
        torch.mm(self.g.t(), self.h, out=self.dw)

    def chunked(self) -> None:
        for i in range(0, len(self.h), 2048):
            h, g = self.h[i : i + 2048], self.g[i : i + 2048]
            torch.mm(h, self.w.t(), out=self.logits[: len(h)])
            torch.mm(g, self.w, out=self.dh[i : i + 2048])
            torch.addmm(self.dw, g.t(), h, out=self.dw)


def loss(x: Problem, module: Any = None, *, frozen: bool = False, **options: Any) -> Outputs:
    """The loss and its gradients; a gradient added to a buffer is returned from zero only on its first call."""
    x.forget()
    arguments = x.arguments()
    if frozen:
        arguments["weight_VD"] = x.weight_VD.detach()
    call = module.linear_policy_loss if module else linear_policy_loss
    value, stats = call(**arguments, **options)
    value.backward()
    out = {"logp": stats["logp_T"], "dhidden": x.hidden_ND.grad, "dweight": options.get("weight_grad_VD")}
    if out["dweight"] is None:
        out["dweight"] = x.weight_VD.grad
    x.forget()
    return {name: tensor for name, tensor in out.items() if tensor is not None}


@torch.no_grad()
def forward(x: Problem) -> Outputs:
    logp_N, _ = linear_logprob(x.hidden_ND, x.weight_VD, x.target_N, with_entropy=True)
    return {"logp": logp_N}
