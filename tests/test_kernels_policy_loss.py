"""The policy loss of a token, worked by hand, and the record that chooses it."""

from __future__ import annotations

import math

import pytest
import torch
from ilr_kernels.policy_loss import PolicyLoss, TokenInputs, Turns, token_loss


def one(loss: PolicyLoss, ratio: float, advantage: float, weight: float = 1.0, **more) -> tuple[float, float, float]:
    """(value, derivative by log π, clipped) of one token of log π = −1 at a given ratio."""
    logp = torch.tensor([-1.0], dtype=torch.float64)
    more = {k: torch.tensor([x], dtype=torch.float64) for k, x in more.items()}
    inputs = TokenInputs(
        torch.full_like(logp, weight), torch.full_like(logp, advantage), logp - math.log(ratio), **more
    )
    found = token_loss(loss, logp, torch.tensor([0.7], dtype=torch.float64), inputs)
    return found.value_N.item(), found.dlogp_N.item(), found.clipped_N.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, (-2.0, -2.0, 0)),
        (1.25, 2.0, (-2.5, -2.5, 0)),
        (1.5, 2.0, (-2.6, 0.0, 1)),  # above 1 + 0.3: the gain is capped
        (0.5, 2.0, (-1.0, -1.0, 0)),  # below, but the gain may recover
        (0.5, -2.0, (1.6, 0.0, 1)),  # below 1 − 0.2: the loss no longer falls
        (1.5, -2.0, (3.0, 3.0, 0)),
        (5.0, -2.0, (10.0, 10.0, 0)),
        (5.0, 0.0, (0.0, 0.0, 0)),
    ],
)
def test_ppo_by_hand(ratio, advantage, expected):
    assert one(PolicyLoss(clip_low=0.2, clip_high=0.3), ratio, advantage) == pytest.approx(expected)


def test_dual_clip_by_hand():
    loss = PolicyLoss(dual_clip=3.0)
    assert one(loss, 5.0, -2.0) == pytest.approx((6.0, 0.0, 1))  # −max(min(rA, …), 3A)
    assert one(loss, 2.5, -2.0) == pytest.approx((5.0, 5.0, 0))
    assert one(loss, 5.0, 2.0) == one(PolicyLoss(), 5.0, 2.0)


def test_cispo_by_hand():
    loss = PolicyLoss(objective="cispo", clip_low=1.0, clip_high=0.5)
    assert one(loss, 1.2, 2.0) == pytest.approx((2.4, -2.4, 0))  # −r A log π with log π = −1
    assert one(loss, 9.0, 2.0) == pytest.approx((3.0, -3.0, 1))  # the ratio is capped, the gradient stays
    assert one(loss, 9.0, -2.0) == pytest.approx((-3.0, 3.0, 1))
    assert one(loss, 0.1, 2.0) == pytest.approx((0.2, -0.2, 0))  # clip_low = 1: no lower bound


def test_kl_by_hand():
    d = 0.4  # log π_ref − log π
    k2 = one(PolicyLoss(kl="k2", beta=0.5), 1.0, 0.0, weight=2.0, ref_logp_N=-1 + d)
    k3 = one(PolicyLoss(kl="k3", beta=0.5), 1.0, 0.0, weight=2.0, ref_logp_N=-1 + d)
    assert k2 == pytest.approx((d * d / 2, -d, 0))
    assert k3 == pytest.approx((math.exp(d) - d - 1, 1 - math.exp(d), 0))
    # off-policy: weighted by the ratio, which is a constant to the gradient
    assert one(PolicyLoss(kl="k2", beta=0.5), 1.5, 0.0, weight=2.0, ref_logp_N=-1 + d)[:2] == pytest.approx(
        (1.5 * d * d / 2, -1.5 * d)
    )


def test_entropy_bonus_by_hand():
    logp, entropy = torch.tensor([-1.0]), torch.tensor([0.7])
    found = token_loss(PolicyLoss(entropy_coef=0.1), logp, entropy, TokenInputs(torch.tensor([2.0]), torch.zeros(1)))
    assert found.value_N.item() == pytest.approx(-0.14) and found.dentropy_N.item() == pytest.approx(-0.2)


@pytest.mark.parametrize(("mode", "weight"), [("truncate", 2.0), ("mask", 0.0)])
def test_importance_by_hand(mode, weight):
    loss = PolicyLoss(importance="token", importance_mode=mode, importance_cap=2.0)
    below = one(loss, 1.1, 1.0, behavior_logp_N=-1 - math.log(1.1) - math.log(1.5))
    above = one(loss, 1.1, 1.0, behavior_logp_N=-1 - math.log(1.1) - math.log(2.5))
    assert below[:2] == pytest.approx((-1.65, -1.65)) and above[:2] == pytest.approx((-1.1 * weight, -1.1 * weight))


def test_importance_stands_on_the_current_policy_without_old_log_probs():
    logp = torch.tensor([-1.0])
    inputs = TokenInputs(torch.ones(1), torch.ones(1), behavior_logp_N=logp - math.log(1.5))
    found = token_loss(PolicyLoss(importance="token"), logp, logp, inputs)
    assert found.value_N.item() == pytest.approx(-1.5) and found.dlogp_N.item() == pytest.approx(-1.5)


def test_sequence_ratio_and_weight_by_hand():
    """Two turns of 2 and 1 tokens: s = exp(mean log r), the weight is the product."""
    logp = torch.zeros(3)
    turns = Turns.of(torch.tensor([7, 7, 3]))
    old, behavior = torch.tensor([-0.3, 0.1, 0.05]), torch.tensor([-0.5, -0.1, 0.05])
    weight, advantage = torch.tensor([1.0, 3.0, 1.0]), torch.tensor([1.0, 1.0, -1.0])
    found = token_loss(
        PolicyLoss(ratio="sequence", importance="sequence", importance_cap=5.0),
        logp, logp, TokenInputs(weight, advantage, old, None, behavior, turns),
    )  # fmt: skip
    s, w = math.exp(0.1), math.exp(0.4)
    torch.testing.assert_close(found.value_N, torch.tensor([-s * w, -3 * s * w, math.exp(-0.05)]))
    torch.testing.assert_close(found.dlogp_N, torch.tensor([-2 * s * w, -2 * s * w, math.exp(-0.05)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": -0.2}, "clip bounds crossed"),
        ({"clip_high": -0.1}, "clip bounds crossed"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"dual_clip": 3.0, "objective": "cispo"}, "dual_clip"),
        ({"ratio": "turn"}, "ratio"),
        ({"objective": "a2c"}, "objective"),
        ({"kl": "k1"}, "kl"),
        ({"importance": "always"}, "importance"),
        ({"importance_mode": "drop"}, "importance_mode"),
        ({"importance_cap": 0.0}, "importance_cap"),
        ({"beta": -0.1}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"beta": "0.1"}, "beta"),
        ({"entropy_coef": float("inf")}, "entropy_coef"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**options)


def test_frozen():
    with pytest.raises(AttributeError):
        PolicyLoss().beta = 1.0  # type: ignore[misc]
