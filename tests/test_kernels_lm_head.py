"""The LM head functions on the CPU: against float64 truth, against finite differences, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from ilr_kernels import reference
from ilr_kernels.lm_head import linear_logprob, linear_policy_loss
from ilr_kernels.policy_loss import PolicyLoss, mean_stats
from kernels_cases import SHAPES, VARIANTS, Variant, check_logprob, check_policy_loss, make_inputs, run


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_against_truth(name):
    for shape in ((7, 24, 101), (33, 20, 300)):
        for dtype in (torch.float32, torch.float64):
            check_policy_loss(shape, name, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_against_truth(shape):
    for name in ("ppo off-policy", "everything", "everything by token"):
        check_policy_loss(shape, name, torch.float32)
        check_policy_loss(shape, name, torch.bfloat16, chunk=None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logprob_against_truth(shape):
    check_logprob(shape, torch.float32)
    check_logprob(shape, torch.bfloat16, softcap=4.0)
    check_logprob(shape, torch.float64, temperature=0.6, softcap=6.0)


@pytest.mark.parametrize("chunk", [1, 2, 32, 33, 1000])
def test_chunk_changes_nothing(chunk):
    check_policy_loss((33, 20, 300), "everything by token", torch.float32, chunk=chunk)
    check_policy_loss((33, 20, 300), "everything", torch.float32, chunk=chunk)


def check_slopes(function, leaves, fixed):
    """Each gradient, along random directions, is the central difference of the value (float64)."""
    leaves = {k: x.detach().clone().requires_grad_() for k, x in leaves.items()}
    function(**leaves, **fixed)[0].backward()
    for name, x in leaves.items():
        for seed in range(4):
            step = 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            with torch.no_grad():
                ahead, back = (function(**{**leaves, name: x + s}, **fixed)[0] for s in (step, -step))
            torch.testing.assert_close((ahead - back) / 2, (x.grad * step).sum(), rtol=1e-5, atol=1e-14)


# of the others the value holds a ratio that the gradient takes for a constant: see the tests that follow
SLOPES = [name for name, v in VARIANTS.items() if v.loss.objective == "ppo" and v.loss.beta == 0]


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("function", [linear_policy_loss, reference.linear_policy_loss], ids=["fused", "reference"])
def test_gradients_by_finite_differences(function, name):
    """Neither trusts the other: the gradient of either is the slope of its value."""
    variant = VARIANTS[name]
    inputs = make_inputs((12, 3, 7), Variant(variant.loss, True, variant.head, variant.bias), torch.float64)
    fixed = inputs.fixed | {"old_logp_T": inputs.fixed["old_logp_T"].double()}
    check_slopes(function, inputs.leaves, fixed)


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_kl_gradient_by_finite_differences(kl):
    """On-policy the ratio that weights the KL is 1 and constant, so the slope of β·KL is its gradient."""
    inputs = make_inputs((12, 3, 7), Variant(PolicyLoss(kl=kl, beta=0.3)), torch.float64)
    fixed = inputs.fixed | {"advantage_T": torch.zeros(12)}
    for function in (linear_policy_loss, reference.linear_policy_loss):
        check_slopes(function, inputs.leaves, fixed)


def test_k2_gradient_is_that_of_the_exact_kl_on_and_off_policy():
    """Summed over the vocabulary with the weights of the sampling policy, Σ π_old · ∇(β r k2) = ∇ KL(π ‖ π_ref)."""
    torch.manual_seed(0)
    weight = torch.randn(9, 4, dtype=torch.float64)
    hidden, ref, old = torch.randn(3, 4, dtype=torch.float64)
    h = hidden.clone().requires_grad_()
    logp, ref_logp, old_logp = ((weight @ x).log_softmax(0) for x in (h, ref, old))
    (logp.exp() * (logp - ref_logp)).sum().backward()
    for sampling in (None, old_logp):
        rows = hidden.expand(9, 4).clone().requires_grad_()
        weights = (logp if sampling is None else sampling).detach().exp()
        value, _ = linear_policy_loss(
            rows, weight, torch.arange(9), torch.zeros(9), weights, old_logp_T=sampling, ref_logp_T=ref_logp,
            loss=PolicyLoss(kl="k2", beta=1.0),
        )  # fmt: skip
        value.backward()
        torch.testing.assert_close(rows.grad.sum(0), h.grad)


def test_rows_without_gradient_are_not_computed():
    inputs = make_inputs((40, 16, 50), Variant(), torch.float32)
    fixed = dict(inputs.fixed)
    idle = (fixed["target_T"] == -100) | (fixed["token_weight_T"] == 0) | (fixed["advantage_T"] == 0)
    hidden = inputs.leaves["hidden_TD"].clone()
    hidden[idle] = float("nan")  # would spoil the sums if it were read
    hidden.requires_grad_()
    value, stats = linear_policy_loss(hidden, inputs.leaves["weight_VD"], **fixed)
    value.backward()
    assert value.isfinite() and (hidden.grad[idle] == 0).all() and (hidden.grad[~idle] != 0).any(1).all()
    assert torch.equal(stats["logp_T"].isnan(), idle) and torch.equal(stats["entropy_T"].isnan(), idle)

    _, stats = linear_policy_loss(
        **inputs.leaves, **{**fixed, "loss": PolicyLoss(beta=0.1)}
    )  # a KL needs rows whose advantage is 0
    assert torch.equal(stats["logp_T"].isnan(), (fixed["target_T"] == -100) | (fixed["token_weight_T"] == 0))


def test_sequence_ratio_computes_whole_turns():
    inputs = make_inputs((8, 16, 50), Variant(PolicyLoss(ratio="sequence"), off_policy=True), torch.float32)
    fixed = inputs.fixed | {
        "turn_T": torch.tensor([5, 5, 5, 2, 2, 2, 9, 9]),
        "target_T": torch.tensor([1, 2, 3, 4, 5, 6, -100, 7]),
        "advantage_T": torch.tensor([1.0, 1, 1, 0, 0, 0, -1, -1]),
        "token_weight_T": torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 1]),
    }
    _, stats = linear_policy_loss(**inputs.leaves, **fixed)
    assert stats["logp_T"].isnan().tolist() == [False, False, False, True, True, True, True, False]


def test_nothing_to_compute():
    inputs = make_inputs((5, 8, 20), Variant(), torch.float32)
    leaves = {k: x.clone().requires_grad_() for k, x in inputs.leaves.items()}
    fixed = inputs.fixed | {"target_T": torch.full((5,), -100)}
    value, stats = linear_policy_loss(**leaves, **fixed)
    value.backward()
    assert value == 0 and stats["sums"]["tokens"] == 0
    assert all((x.grad == 0).all() for x in leaves.values())
    logp = linear_logprob(**leaves, target_T=fixed["target_T"])
    logp.sum().backward()
    assert (logp == 0).all()


def test_no_gradient_is_formed_where_none_is_wanted():
    inputs = make_inputs((9, 8, 20), Variant(), torch.float32)
    weight = inputs.leaves["weight_VD"].clone().requires_grad_()
    hidden = inputs.leaves["hidden_TD"].clone().requires_grad_()
    whole = run(linear_policy_loss, inputs, torch.float32, 1.0)
    with torch.no_grad():
        value, _ = linear_policy_loss(hidden, weight, **inputs.fixed)
    assert not value.requires_grad and value == whole["value"]
    value, _ = linear_policy_loss(hidden, weight.detach(), **inputs.fixed)  # a frozen head, as under LoRA
    value.backward()
    torch.testing.assert_close(hidden.grad, whole["dhidden_TD"])
    value, _ = linear_policy_loss(hidden.detach(), weight, **inputs.fixed)
    value.backward()
    torch.testing.assert_close(weight.grad, whole["dweight_VD"])


def test_weight_grad_buffer():
    inputs = make_inputs((33, 8, 20), Variant(), torch.float32)
    whole = run(linear_policy_loss, inputs, torch.float32, 1.0)
    leaves = {k: x.clone().requires_grad_() for k, x in inputs.leaves.items()}
    buffer = torch.ones_like(leaves["weight_VD"])
    value, _ = linear_policy_loss(**leaves, **inputs.fixed, weight_grad_VD=buffer, chunk=4)
    torch.testing.assert_close(buffer, 1 + whole["dweight_VD"])
    value.backward()
    assert leaves["weight_VD"].grad is None
    torch.testing.assert_close(leaves["hidden_TD"].grad, whole["dhidden_TD"])

    value, _ = linear_policy_loss(**leaves, **inputs.fixed, weight_grad_VD=buffer)
    with pytest.raises(ValueError, match="weight_grad_VD"):
        (2 * value).backward()
    before = buffer.clone()
    with torch.no_grad():
        linear_policy_loss(**leaves, **inputs.fixed, weight_grad_VD=buffer)
    assert torch.equal(buffer, before)


def test_second_backward_is_refused():
    inputs = make_inputs((9, 8, 20), Variant(), torch.float32)
    hidden = inputs.leaves["hidden_TD"].clone().requires_grad_()
    value, _ = linear_policy_loss(hidden, inputs.leaves["weight_VD"], **inputs.fixed)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        value.backward()


def test_tied_head_adds_up():
    """The embedding is the head: its gradient has a part from either end."""
    inputs = make_inputs((20, 12, 30), Variant(), torch.float32)
    grads = []
    for function in (reference.linear_policy_loss, linear_policy_loss):
        weight = inputs.leaves["weight_VD"].clone().requires_grad_()
        hidden = torch.tanh(weight[torch.arange(20)])
        value, _ = function(hidden, weight, **inputs.fixed)
        value.backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


def test_strided_inputs():
    inputs = make_inputs((20, 12, 30), VARIANTS["everything"], torch.float32)
    whole = run(linear_policy_loss, inputs, torch.float32, 1.0)
    wide = torch.stack([inputs.leaves["hidden_TD"], torch.full((20, 12), 7.0)], 1).flatten(0, 1)
    leaves = {
        "hidden_TD": wide[::2].requires_grad_(),
        "weight_VD": inputs.leaves["weight_VD"].t().contiguous().t().requires_grad_(),
        "bias_V": inputs.leaves["bias_V"].repeat_interleave(2)[::2].requires_grad_(),
    }
    assert not leaves["hidden_TD"].is_contiguous() and not leaves["weight_VD"].is_contiguous()
    value, _ = linear_policy_loss(**leaves, **inputs.fixed)
    grads = torch.autograd.grad(value, list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, whole[f"d{name}"])


def test_statistics_by_hand():
    """Four tokens under uniform logits over 4: log π = −log 4, entropy log 4."""
    uniform = torch.tensor(4.0).log()
    drift = torch.tensor([0.5, -0.5, 0.5, 0.0])  # log r
    value, stats = linear_policy_loss(
        torch.ones(6, 2), torch.zeros(4, 2), torch.tensor([0, 1, 2, 3, 0, -100]),
        torch.tensor([1.0, 1.0, -1.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0, 1.0]),
        old_logp_T=torch.cat([-uniform - drift, torch.zeros(2)]),
        ref_logp_T=torch.full((6,), -uniform.item()),
        behavior_logp_T=torch.cat([-uniform - drift - torch.tensor([1.0, 0.0, -1.0, 2.0]), torch.zeros(2)]),
        loss=PolicyLoss(beta=0.5, importance="token"),
    )  # fmt: skip
    e = drift.exp()
    w = torch.tensor([2.0, 1.0, float(torch.tensor(-1.0).exp())])  # exp(1) is above its cap of 2
    torch.testing.assert_close(value, -(1 * w[0] * 1.2 + 2 * w[1] * e[1] - 1 * w[2] * e[2]))
    counts = {k: float(stats["sums"][k]) for k in ("tokens", "policy_tokens", "clipped", "truncated")}
    assert counts == {"tokens": 4, "policy_tokens": 3, "clipped": 1, "truncated": 1}
    torch.testing.assert_close(stats["entropy"], uniform)
    torch.testing.assert_close(stats["clip_share"], torch.tensor(1 / 3))
    assert stats["kl"] == 0 and stats["logp_T"][4:].isnan().all() and not stats["logp_T"][:4].isnan().any()


def test_micro_batches_add_up():
    inputs = make_inputs((40, 16, 50), VARIANTS["everything by token"], torch.float64)
    whole_value, whole = linear_policy_loss(**inputs.leaves, **inputs.fixed)
    total: dict[str, torch.Tensor] = {}
    value = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 13), slice(13, 40)):
        cut = {k: x[part] if k.endswith("_T") else x for k, x in inputs.fixed.items()}
        hidden = inputs.leaves["hidden_TD"][part]
        other = {k: x for k, x in inputs.leaves.items() if k != "hidden_TD"}
        part_value, stats = linear_policy_loss(hidden, **other, **cut)
        value += part_value
        total = {k: total.get(k, 0) + x for k, x in stats["sums"].items()}
    torch.testing.assert_close(value, whole_value)
    for key, mean in mean_stats(total).items():
        torch.testing.assert_close(mean, whole[key])


def test_absent_numbers_are_none():
    inputs = make_inputs((9, 8, 20), Variant(), torch.float32)
    _, stats = linear_policy_loss(**inputs.leaves, **(inputs.fixed | {"ref_logp_T": None}))
    assert stats["kl"] is None and stats["truncated_share"] is None and stats["clip_share"] == 0


BAD = {
    "hidden_TD": [torch.zeros(5), torch.zeros(5, 4, dtype=torch.int64)],
    "weight_VD": [torch.zeros(7, 3), torch.zeros(7, 4).double(), torch.zeros(7, 4, device="meta")],
    "target_T": [
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(5),
        torch.tensor([0, 1, 7, 0, 0]),
        torch.full((5,), -1),
    ],
    "advantage_T": [torch.zeros(4), torch.zeros(5, dtype=torch.int64), torch.zeros(5, device="meta")],
    "token_weight_T": [torch.zeros(5, 1)],
    "old_logp_T": [torch.zeros(6)],
    "ref_logp_T": [torch.zeros(6), None],
    "behavior_logp_T": [torch.zeros(6), None],
    "turn_T": [torch.zeros(4, dtype=torch.int64), torch.zeros(5), None],
    "bias_V": [torch.zeros(5), torch.zeros(7).double()],
    "temperature": [0.0, -1.0, float("nan")],
    "softcap": [0.0],
    "chunk": [0],
    "weight_grad_VD": [torch.zeros(4, 7), torch.zeros(7, 4, dtype=torch.float16)],
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_name_the_argument(name):
    good = {
        "hidden_TD": torch.zeros(5, 4), "weight_VD": torch.zeros(7, 4), "target_T": torch.zeros(5, dtype=torch.int64),
        "advantage_T": torch.ones(5), "token_weight_T": torch.ones(5), "ref_logp_T": torch.zeros(5),
        "behavior_logp_T": torch.zeros(5), "turn_T": torch.zeros(5, dtype=torch.int64),
        "loss": PolicyLoss(ratio="sequence", beta=0.1, importance="token"),
    }  # fmt: skip
    linear_policy_loss(**good)
    for bad in BAD[name]:
        with pytest.raises(ValueError, match=f"^{name}"):
            linear_policy_loss(**{**good, name: bad})


def test_turns_are_looked_at_where_the_loss_does_not_need_them():
    tokens = torch.zeros(5, 4), torch.zeros(7, 4), torch.zeros(5, dtype=torch.int64), torch.ones(5), torch.ones(5)
    for bad in (torch.zeros(4, dtype=torch.int64), torch.zeros(5)):
        with pytest.raises(ValueError, match="^turn_T"):
            linear_policy_loss(*tokens, turn_T=bad)
