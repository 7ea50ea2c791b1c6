"""The policy loss over the vocabulary with both gradients, beside its three cuBLAS products, plain PyTorch and peers.

    ilr-fast bench lm_head            # N = 16,384, bf16, one NVIDIA GPU; writes benchmarks/results/lm_head.json

The limit is logits, dhidden and dweight as three whole products, in the same interleaved run. Where dweight is added to
what is there, or not wanted, the limit of that work has a row of its own: what `target` does not say `floor` does. Rows
named `host` are what a call takes on the host with an idle GPU (`host.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ilr_benchmarks import host, peers
from ilr_benchmarks.measure import Case, Outputs, Target, measure, relative_error
from ilr_benchmarks.problem import Problem, policy_truth
from ilr_kernels import reference
from ilr_kernels.lm_head import linear_logprob, linear_policy_loss
from ilr_kernels.policy_loss import PolicyLoss
from torch import Tensor

Size = tuple[int, int, int]  # rows, hidden size, vocabulary
SHAPES = ((16384, 4096, 128256), (16384, 896, 151936))
QUICK = ((64, 32, 1000),)
SMALL_CHUNK = 2048
GRPO, GSPO, BONUS = PolicyLoss(), PolicyLoss(ratio="sequence"), PolicyLoss(entropy_coef=0.01)
LIMIT, ONE, OURS = "limit: three whole products", "limit: one product", "ours, new dweight"
ADDED, FROZEN = "limit: three products, dweight added to a gradient", "limit: two products, no dweight"
# targets by hidden size: (4096, 896)
T = {"loss": (1.05, 1.20), "exact": (1.18, 1.45), "liger": (12, 25), "cce": (4, 3.3), "gib": (2.2, 1.5), 
     "half": (0.56, 0.58), "half_all": (0.72, 0.74), "frozen": (0.72, 0.72), "forward": (1.10, 1.20)}  # fmt: skip


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> list[dict[str, Any]]:
    """Rows of both shapes."""
    rows = []
    shapes = QUICK if quick else SHAPES
    for size in shapes:
        x = make(size, device)
        column = 0 if size[1] > 2048 or quick else 1
        rows += measure(cases(x, column, only_ours), name_of(x), rounds, device, queued=True)
        del x
        release(device)
    return rows + host_rows(shapes, rows, device)


def make(size: Size, device: str) -> Problem:
    """The problem of a size: bfloat16 on a GPU, float32 elsewhere."""
    return Problem.make(*size, device, torch.bfloat16 if device == "cuda" else torch.float32)


def name_of(x: Problem) -> str:
    """What `shape` says of a row: N=16384 D=896 V=151936 bfloat16."""
    (n, d), v = x.hidden_ND.shape, len(x.weight_VD)
    return f"N={n} D={d} V={v} {str(x.hidden_ND.dtype).removeprefix('torch.')}"


def release(device: str) -> None:
    """Gives back what the last shape held."""
    Truth.held = None
    if device == "cuda":
        torch.cuda.empty_cache()


def host_rows(sizes: Sequence[Size], rows: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """What the host spends on a call at these sizes, of the variants that were found right and timed in `rows`.

    After all times of the device, since the profiler that it needs slows launches for as long as it is loaded."""
    found = []
    for size in sizes:
        x = make(size, device)
        works: dict[str, Callable[[], Any]] = {LIMIT: Products(x).whole, OURS: lambda x=x: loss(x)}
        checked = {row["variant"]: row for row in rows if row["shape"] == name_of(x)}
        for name, work in works.items():
            found += host.rows(name, work, checked[name], device)
        del x, works, work
        release(device)
    return found


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
        Case(ADDED, products.added, limit=LIMIT),
        Case(FROZEN, products.frozen, limit=LIMIT),
        Case(ONE, products.one),
        Case("ours, linear_logprob with entropy, forward", lambda: forward(x), base.error(), limit=ONE,
             targets=(Target("limit", t["forward"]),)),
        ours(OURS, base, lambda: loss(x), Target("limit", t["loss"]), *against),
        ours("ours, into a gradient of the weight's dtype", base, lambda: loss(x, weight_grad_VD=buffer_VD),
             Target("share", t["loss"], ADDED), Target("gib", t["gib"]), buffer=buffer_VD),
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

    def error(self, keep_N: Tensor | None = None) -> Callable[[Outputs], dict[str, float]]:
        """Relative errors of what a variant returns; of log-probs and entropies in the rows of keep_N alone.

        The loss is a sum whose terms cancel: its error is relative to Σ token_weight · |advantage|."""

        def errors(found: Outputs) -> dict[str, float]:
            if Truth.held is None or Truth.held[0] is not self:
                Truth.held = None
                Truth.held = self, self.make(self.x, self.loss)
            exact = Truth.held[1]
            kept = {name: keep_N if name in ("logp", "entropy") else None for name in found}
            relative = {
                name: relative_error(*(y if kept[name] is None else y[kept[name]] for y in (tensor, exact[name])))
                for name, tensor in found.items()
                if name != "loss"
            }
            if "loss" in found:
                scale = (self.x.token_weight_N * self.x.advantage_N).abs().sum()
                relative["loss"] = float((found["loss"].double() - exact["loss"]).abs() / scale)
            return relative

        return errors


class Products:
    """The limit: the same three products and nothing else, their outputs allocated before.

    The logits stand in for their own gradient: a second tensor of their size would not fit where N is large."""

    def __init__(self, x: Problem):
        self.h, self.w = x.hidden_ND.detach(), x.weight_VD.detach()
        self.logits = torch.empty(len(self.h), len(self.w), device=self.h.device, dtype=self.h.dtype)
        self.dh, self.dw = torch.empty_like(self.h), torch.zeros_like(self.w)

    def one(self) -> None:
        torch.mm(self.h, self.w.t(), out=self.logits)

    def whole(self) -> None:
        self.frozen()
        torch.mm(self.logits.t(), self.h, out=self.dw)

    def frozen(self) -> None:
        self.one()
        torch.mm(self.logits, self.w, out=self.dh)

    def added(self) -> None:
        self.frozen()
        self.dw.addmm_(self.logits.t(), self.h)

    def chunked(self) -> None:
        for i in range(0, len(self.h), 2048):
            h = self.h[i : i + 2048]
            g = torch.mm(h, self.w.t(), out=self.logits[: len(h)])
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
    out = {"loss": value.detach(), "logp": stats["logp_T"], "entropy": stats["entropy_T"],
           "dhidden": x.hidden_ND.grad, "dweight": options.get("weight_grad_VD")}  # fmt: skip
    if out["dweight"] is None:
        out["dweight"] = x.weight_VD.grad
    x.forget()
    return {name: tensor for name, tensor in out.items() if tensor is not None}


@torch.no_grad()
def forward(x: Problem) -> Outputs:
    logp_N, entropy_N = linear_logprob(x.hidden_ND, x.weight_VD, x.target_N, with_entropy=True)
    return {"logp": logp_N, "entropy": entropy_N}
