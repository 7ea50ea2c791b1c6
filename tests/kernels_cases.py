"""Inputs and comparisons that the kernel tests share: on the CPU, under Triton's interpreter and on a GPU.

A case is compared as follows: the truth is the reference in float64 on the very inputs; plain is the reference in the
inputs' own dtype; the fused error must not exceed plain's (and a half) plus a tolerance of the dtype. Ratios and
importance weights are drawn well away from the bounds that cut them, so that rounding moves no token across.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from ilr_kernels import reference
from ilr_kernels.lm_head import linear_logprob, linear_policy_loss, logits_logprob
from ilr_kernels.policy_loss import PolicyLoss
from torch import Tensor

# rows, hidden size, vocabulary: one row, rows off the block, vocabularies off 64, more than one block of the vocabulary
SHAPES = [(1, 8, 3), (2, 4, 1), (7, 24, 101), (33, 20, 1000), (40, 32, 513), (34, 48, 257), (5, 64, 5003), (17, 12, 64)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Variant:
    """A loss, whether log-probs are given that make it off-policy, and how the logits are finished."""

    loss: PolicyLoss = PolicyLoss()
    off_policy: bool = False
    head: dict[str, Any] = field(default_factory=dict)
    bias: bool = False


VARIANTS = {
    "ppo": Variant(),
    "ppo off-policy": Variant(off_policy=True),
    "two bounds": Variant(PolicyLoss(clip_low=0.1, clip_high=0.4), off_policy=True),
    "dual clip": Variant(PolicyLoss(dual_clip=1.5), off_policy=True),
    "gspo": Variant(PolicyLoss(ratio="sequence")),
    "gspo off-policy": Variant(PolicyLoss(ratio="sequence"), off_policy=True),
    "cispo": Variant(PolicyLoss(objective="cispo")),
    "cispo off-policy": Variant(PolicyLoss(objective="cispo", clip_low=1.0), off_policy=True),
    "cispo sequence": Variant(PolicyLoss(objective="cispo", ratio="sequence"), off_policy=True),
    "k2": Variant(PolicyLoss(kl="k2", beta=0.3)),
    "k2 off-policy": Variant(PolicyLoss(kl="k2", beta=0.3), off_policy=True),
    "k3": Variant(PolicyLoss(kl="k3", beta=0.3)),
    "k3 off-policy": Variant(PolicyLoss(kl="k3", beta=0.3), off_policy=True),
    "entropy": Variant(PolicyLoss(entropy_coef=0.2)),
    "token truncated": Variant(PolicyLoss(importance="token")),
    "token masked": Variant(PolicyLoss(importance="token", importance_mode="mask"), off_policy=True),
    "sequence truncated": Variant(PolicyLoss(importance="sequence"), off_policy=True),
    "sequence masked": Variant(PolicyLoss(importance="sequence", importance_mode="mask")),
    "softcap": Variant(head={"softcap": 5.0}),
    "temperature": Variant(head={"temperature": 0.7}),
    "everything": Variant(
        PolicyLoss(ratio="sequence", kl="k2", beta=0.1, entropy_coef=0.1, importance="sequence", dual_clip=1.5),
        off_policy=True,
        head={"softcap": 8.0, "temperature": 1.3},
        bias=True,
    ),
    "everything by token": Variant(
        PolicyLoss(kl="k3", beta=0.1, entropy_coef=0.1, importance="token", dual_clip=1.5),
        off_policy=True,
        head={"softcap": 8.0, "temperature": 1.3},
        bias=True,
    ),
}


@contextmanager
def poisoned() -> Iterator[None]:
    """Within: torch.empty and its kin give NaN, so that what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@dataclass(frozen=True)
class Inputs:
    """Arguments of `linear_policy_loss`: the tensors that want gradients, and the rest."""

    leaves: dict[str, Tensor]
    fixed: dict[str, Any]


def make_inputs(
    shape: tuple[int, int, int], variant: Variant, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Inputs:
    """Inputs of a real scale: peaked distributions, turns of ragged length, some rows ignored, some without weight."""
    t, d, v = shape
    g = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, device=device)

    def uniform(size: int = t) -> Tensor:
        return torch.rand(size, generator=g, device=device)

    def some() -> Tensor:
        return torch.randperm(t, generator=g, device=device)[: t // 6]

    def one_of(values: list[float], turn: Tensor) -> Tensor:
        which = torch.randint(len(values), (int(turn.max()) + 1,), generator=g, device=device)
        return torch.tensor(values, device=device)[which][turn]

    hidden, weight = normal(t, d).to(dtype), (normal(v, d) * 3 / d**0.5).to(dtype)
    bias = normal(v).to(dtype) if variant.bias else None
    target = torch.randint(v, (t,), generator=g, device=device)
    turn = torch.cumsum(uniform() < 0.3, 0)
    advantage, token_weight = normal(t), uniform() / t
    if t > 4:
        target[some()] = -100
        token_weight[some()] = 0
        advantage[turn == turn[t // 2]] = 0
    exact = [x if x is None else x.double() for x in (hidden, weight, bias)]
    with torch.no_grad():
        logp = reference.linear_logprob(*exact[:2], target, bias_V=exact[2], **variant.head)
    per_turn = torch.bincount(turn[target != -100], minlength=int(turn.max()) + 1).clamp(min=1)[turn]
    drift = one_of([-0.9, -0.03, 0.0, 0.02, 0.65], turn)
    gap = one_of([-1.3, -0.2, 0.0, 0.2, 1.3], turn)
    old = logp - drift
    fixed: dict[str, Any] = {
        "target_T": target,
        "advantage_T": advantage,
        "token_weight_T": token_weight,
        "old_logp_T": old.float() if variant.off_policy else None,
        "ref_logp_T": (logp + 0.5 * normal(t)).float(),
        "behavior_logp_T": ((old if variant.off_policy else logp) - gap / per_turn).float(),
        "turn_T": turn,
    }
    leaves = {"hidden_TD": hidden, "weight_VD": weight} | ({} if bias is None else {"bias_V": bias})
    return Inputs(leaves, fixed | {"loss": variant.loss, **variant.head})


def run(function: Any, inputs: Inputs, dtype: torch.dtype, upstream: float, **more: Any) -> dict[str, Tensor]:
    """Value, statistics and gradients, by name."""
    leaves = {k: x.detach().to(dtype).requires_grad_() for k, x in inputs.leaves.items()}
    value, stats = function(**leaves, **inputs.fixed, **more)
    (value * upstream).backward()
    found = {"value": value.detach(), "logp_T": stats["logp_T"], "entropy_T": stats["entropy_T"]}
    return found | {f"d{k}": x.grad for k, x in leaves.items()}


def with_garbage(inputs: Inputs) -> Inputs:
    """The same with NaN in whatever belongs to an ignored row, which nothing may read into a result."""
    ignored = inputs.fixed["target_T"] == -100
    fixed = {
        k: torch.where(ignored, float("nan"), x) if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in inputs.fixed.items()
    }
    return Inputs(inputs.leaves, fixed)


def relative_error(found: Tensor, truth: Tensor, floor: float = 1e-3) -> float:
    """The largest deviation by the largest truth, or by `floor` where that is larger."""
    return float((found.double() - truth).abs().max() / truth.abs().max().clamp(min=floor))


def check_policy_loss(
    shape: tuple[int, int, int],
    name: str,
    dtype: torch.dtype,
    device: str = "cpu",
    chunk: int | None = 5,
    seed: int = 0,
) -> None:
    """Fused against truth: value, log-probs, entropies and every gradient, under a random upstream gradient."""
    inputs = make_inputs(shape, VARIANTS[name], dtype, device, seed)
    upstream = 0.5 + float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
    truth = run(reference.linear_policy_loss, inputs, torch.float64, upstream)
    plain = run(reference.linear_policy_loss, inputs, dtype, upstream)
    with poisoned():
        fused = run(linear_policy_loss, with_garbage(inputs), dtype, upstream, chunk=chunk)
    for key in ("logp_T", "entropy_T"):
        computed = ~fused[key].isnan()
        needed = (inputs.fixed["target_T"] != -100) & (inputs.fixed["token_weight_T"] != 0)
        needed &= inputs.fixed["advantage_T"] != 0
        assert (computed | ~needed).all(), f"{key}: rows were left out that the loss needs"
        truth[key], plain[key], fused[key] = (
            x[key][computed] if computed.any() else torch.zeros(1, device=device) for x in (truth, plain, fused)
        )
    compare(truth, plain, fused, dtype, f"{name} {shape} {dtype}")


def check_logprob(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", keep_softmax: bool = False, **head: Any
) -> None:
    """`linear_logprob` with entropies against truth, with gradients from random upstream vectors."""
    inputs = make_inputs(shape, Variant(head=dict(head), bias=True), dtype, device, seed=1)
    up = torch.randn(2, shape[0], generator=torch.Generator().manual_seed(2)).to(device)

    head["keep_softmax"] = keep_softmax

    def results(function: Any, to: torch.dtype) -> dict[str, Tensor]:
        leaves = {k: x.detach().to(to).requires_grad_() for k, x in inputs.leaves.items()}
        logp, entropy = function(**leaves, target_T=inputs.fixed["target_T"], with_entropy=True, **head)
        ((logp * up[0]).sum() + (entropy * up[1]).sum()).backward()
        found = {"logp_T": logp.detach(), "entropy_T": entropy.detach()}
        return found | {f"d{k}": x.grad for k, x in leaves.items()}

    truth, plain = results(reference.linear_logprob, torch.float64), results(reference.linear_logprob, dtype)
    with poisoned():
        fused = results(linear_logprob, dtype)
    compare(truth, plain, fused, dtype, f"logprob {shape} {dtype} {head}")


def check_within_dweight(shape: tuple[int, int, int], device: str = "cpu") -> None:
    """All rows at once where a part of the exponentials lies in the new dweight, whatever room there is besides."""
    from ilr_kernels import softmax_product

    found, kept = [], (softmax_product._within_dweight, softmax_product.gpu_chunk)

    def unbounded(head: Any, hidden_ND: Tensor, grads: Any, most: int) -> Any:
        found.append(kept[0](head, hidden_ND, grads, 2**40))
        return found[-1]

    softmax_product._within_dweight, softmax_product.gpu_chunk = unbounded, lambda vocabulary, depth: 1
    try:
        for name in ("ppo off-policy", "everything by token"):
            check_policy_loss(shape, name, torch.bfloat16, device, chunk=None)
        check_logprob(shape, torch.bfloat16, device)
        check_overflow(shape, device)
    finally:
        softmax_product._within_dweight, softmax_product.gpu_chunk = kept
    assert len(found) >= 4 and all(blocks is not None for blocks in found), "not the case that was meant"


def check_overflow(shape: tuple[int, int, int], device: str = "cpu") -> None:
    """Targets so improbable that exp(x − x_target) overflows float32, beside ordinary ones, in bfloat16."""
    t, d, v = shape
    g = torch.Generator(device).manual_seed(5)
    weight = (torch.randn(v, d, generator=g, device=device) / d**0.5).bfloat16()
    hidden = torch.randn(t, d, generator=g, device=device).bfloat16()
    target = torch.randint(1, v, (t,), generator=g, device=device)
    weight[0] *= 4
    hidden[0] = 300 * weight[0] / weight[0].float().norm() ** 2  # logit 300 at token 0

    def results(function: Any, to: torch.dtype) -> dict[str, Tensor]:
        h, w = (x.detach().to(to).requires_grad_() for x in (hidden, weight))
        logp, entropy = function(h, w, target, with_entropy=True)
        logp.sum().backward()
        return {"logp_T": logp.detach(), "entropy_T": entropy.detach(), "dhidden": h.grad, "dweight": w.grad}

    truth, plain = results(reference.linear_logprob, torch.float64), results(reference.linear_logprob, torch.bfloat16)
    assert truth["logp_T"][0] < -150
    compare(truth, plain, results(linear_logprob, torch.bfloat16), torch.bfloat16, f"overflow {shape}")


def check_logits(shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu", **head: Any) -> None:
    """`logits_logprob` against truth, the logits left as they are; one target lies 300 nats below the peak."""
    g = torch.Generator(device).manual_seed(4)
    logits = (4 * torch.randn(shape, generator=g, device=device)).to(dtype)
    target = torch.randint(shape[1], shape[:1], generator=g, device=device)
    target[:: 1 + shape[0] // 3] = -100
    logits[1, target[1]] = -300.0
    before = logits.clone()

    def results(function: Any, of: Tensor) -> dict[str, Tensor]:
        logp, entropy = function(of, target, with_entropy=True, **head)
        return {"logp_T": logp, "entropy_T": entropy}

    truth, plain = results(reference.logits_logprob, logits.double()), results(reference.logits_logprob, logits)
    with poisoned():
        fused = results(logits_logprob, logits)
    compare(truth, plain, fused, torch.float32, f"logits {shape} {dtype} {head}")
    assert torch.equal(logits, before)


def check_with_logp(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> None:
    """With `with_logp` every row that is not ignored has its log-prob and entropy; the loss is the same."""
    inputs = make_inputs(shape, VARIANTS["ppo off-policy"], dtype, device)
    some = run(linear_policy_loss, inputs, dtype, 1.0)
    every = run(linear_policy_loss, inputs, dtype, 1.0, with_logp=True)
    truth = run(reference.linear_policy_loss, inputs, torch.float64, 1.0)
    valid = inputs.fixed["target_T"] != -100
    assert torch.equal(every["logp_T"].isnan(), ~valid) and torch.equal(every["entropy_T"].isnan(), ~valid)
    assert torch.equal(every["value"], some["value"]) and torch.equal(every["dhidden_TD"], some["dhidden_TD"])
    assert some["logp_T"][valid].isnan().any(), "no row of zero weight: nothing was tested"
    for key in ("logp_T", "entropy_T"):
        assert relative_error(every[key][valid], truth[key][valid]) < 20 * TOLERANCE[dtype], key


def compare(
    truth: dict[str, Tensor], plain: dict[str, Tensor], fused: dict[str, Tensor], dtype: torch.dtype, what: str
) -> None:
    """The fused error of every result at most plain's and a half, plus the dtype's tolerance."""
    assert truth.keys() == fused.keys()
    for key, exact in truth.items():
        assert fused[key].shape == exact.shape, f"{what}: {key} has shape {tuple(fused[key].shape)}"
        small = key == "value" or not exact.any()  # tokens may cancel; with a vocabulary of one all is 0
        floor = 0.1 if small else 1e-3
        error = relative_error(fused[key], exact, floor)
        allowed = 1.5 * relative_error(plain[key], exact, floor) + TOLERANCE[dtype]
        assert error <= allowed, f"{what}: {key} is off by {error:.2e}, allowed {allowed:.2e}"


def check_advantage(
    shape: tuple[int, int, int], calibrate: str, normalize: str, masked: bool, device: str = "cpu", dtype=torch.float32
) -> None:
    """`calibrated_advantage` against the float64 reference, garbage where masked."""
    from ilr_kernels.advantage import calibrated_advantage

    g = torch.Generator().manual_seed(3)
    rewards = (torch.randint(4, shape, generator=g) / 4 + 0.1 * torch.randint(2, shape, generator=g)).to(dtype)
    mask = torch.rand(shape, generator=g) < 0.7 if masked else None
    if masked:
        mask[-1, 0] = False  # a group without samples
        mask[0, -1] = torch.arange(shape[2]) == 0  # a group of one
    options = {"calibrate": calibrate, "normalize": normalize, "calibrate_weight": 0.5}
    truth = reference.calibrated_advantage(rewards.double(), mask, **options)
    garbage = rewards if mask is None else torch.where(mask, rewards, float("nan"))
    with poisoned():
        found = calibrated_advantage(garbage.to(device), None if mask is None else mask.to(device), **options)
    for x, exact in zip(found, truth, strict=True):
        assert x.dtype == torch.float32
        assert relative_error(x.cpu(), exact) < 5e-6, (shape, options, masked)
        assert mask is None or (x.cpu()[~mask] == 0).all()
