"""Perception Calibration and the group advantage: cases worked by hand, and what calibration can change."""

from __future__ import annotations

import pytest
import torch
from ilr_kernels import reference
from ilr_kernels.advantage import calibrated_advantage
from kernels_cases import check_advantage

BOTH = pytest.mark.parametrize("function", [calibrated_advantage, reference.calibrated_advantage], ids=["fused", "ref"])


def groups(*agents):
    """Rewards [M, 1, G] of one question."""
    return torch.tensor(agents, dtype=torch.float32)[:, None]


@BOTH
def test_calibration_of_two_agents_by_hand(function):
    calibrated, _ = function(groups([1.0, 0.5, 0.0], [0.75, 0.25, 0.5]))
    # against agent 2 (mean 0.5, range 0.5) clipped at ±1; against agent 1 (mean 0.5, range 1)
    expected = groups([1 + 1, 0.5 + 0, 0 - 1], [0.75 + 0.25, 0.25 - 0.25, 0.5 + 0])
    torch.testing.assert_close(calibrated, expected)


@BOTH
def test_calibration_of_three_agents_by_hand(function):
    calibrated, _ = function(groups([1.0, 0.0], [0.5, 0.3], [0.9, 0.1]))
    # each peer's term is clipped at ±1/2; agent 1 against (mean 0.4, range 0.2) and (mean 0.5, range 0.8)
    # agent 2 against (0.5, 1) and (0.5, 0.8); agent 3 against (0.5, 1) and (0.4, 0.2)
    expected = groups(
        [1 + 0.5 + 0.5, 0 - 0.5 - 0.5], [0.5 + 0 + 0, 0.3 - 0.2 - 0.25], [0.9 + 0.4 + 0.5, 0.1 - 0.4 - 0.5]
    )
    torch.testing.assert_close(calibrated, expected)


@BOTH
def test_limit_where_a_peer_is_constant(function):
    calibrated, _ = function(groups([1.0, 0.3, 0.0], [0.3, 0.3, 0.3]))
    torch.testing.assert_close(calibrated[0, 0], torch.tensor([2.0, 0.3, -1.0]))
    assert calibrated[0, 0, 1] == torch.tensor(0.3)  # the mean of 0.3, 0.3, 0.3 may round; the limit must not see it
    three, _ = function(groups([1.0, 0.0], [0.0, 0.0], [1.0, 1.0]))
    torch.testing.assert_close(three[0, 0], torch.tensor([1.5, -0.5]))


@BOTH
def test_ragged_groups(function):
    rewards = groups([1.0, 0.0, 9.0, 9.0], [0.8, 0.2, 0.5, 9.0], [9.0, 9.0, 9.0, 9.0])
    mask = torch.tensor([[[1, 1, 0, 0]], [[1, 1, 1, 0]], [[0, 0, 0, 0]]], dtype=torch.bool)
    calibrated, advantage = function(torch.where(mask, rewards, float("nan")), mask)
    # three agents, so the bound is 1/2, though the third has no sample and adds nothing
    expected = groups([1.5, -0.5, 0, 0], [0.8 + 0.3, 0.2 - 0.3, 0.5, 0], [0, 0, 0, 0])
    torch.testing.assert_close(calibrated, expected)
    assert (advantage[~mask] == 0).all()
    torch.testing.assert_close(advantage[1, 0, :3], torch.tensor([1, -1, 0]) * 0.6 / (0.6 + 1e-4))


@BOTH
@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("grpo", [1.5 / (1 + 1e-4), -0.5 / (1 + 1e-4), -0.5 / (1 + 1e-4), -0.5 / (1 + 1e-4)]),
        ("dr_grpo", [1.5, -0.5, -0.5, -0.5]),
        ("rloo", [2.0, -2 / 3, -2 / 3, -2 / 3]),
    ],
)
def test_normalizations_by_hand(function, normalize, expected):
    """Rewards 2, 0, 0, 0: mean 0.5, squares 2.25 + 3 · 0.25 = 3, std with n − 1 = 1; the others' means 0 and 2/3."""
    _, advantage = function(groups([2.0, 0.0, 0.0, 0.0]), normalize=normalize)
    torch.testing.assert_close(advantage[0, 0], torch.tensor(expected))


@BOTH
@pytest.mark.parametrize("normalize", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("calibrate", ["reward", "none", "advantage"])
def test_no_advantage_in_a_group_of_one_or_of_equals(function, normalize, calibrate):
    rewards = groups([0.1, 0.1, 0.1], [0.9, 5.0, 5.0])
    mask = torch.tensor([[[1, 1, 1]], [[1, 0, 0]]], dtype=torch.bool)
    _, advantage = function(rewards, mask, normalize=normalize, calibrate=calibrate)
    assert (advantage[1] == 0).all()
    expected = -1.0 if calibrate == "advantage" else 0.0  # all wrong where the peer is right: pushed away
    assert (advantage[0] == expected).all()


@BOTH
def test_one_agent_is_plain_grpo(function):
    rewards = torch.rand(1, 3, 8, generator=torch.Generator().manual_seed(0))
    calibrated, advantage = function(rewards)
    assert torch.equal(calibrated, rewards)
    mean, std = rewards.mean(-1, keepdim=True), rewards.std(-1, keepdim=True)
    torch.testing.assert_close(advantage, (rewards - mean) / (std + 1e-4))


@BOTH
@pytest.mark.parametrize("agents", [2, 3])
def test_calibration_of_two_valued_rewards(function, agents):
    """With two values calibration is affine in R: a no-op after the division by std, else a factor of 2 (m = 2) or
    between 2 and 3 (m = 3)."""
    rewards = (torch.rand(agents, 50, 8, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    for normalize in ("grpo", "dr_grpo"):
        _, calibrated = function(rewards, normalize=normalize, eps=0.0)
        _, plain = function(rewards, normalize=normalize, eps=0.0, calibrate="none")
        mixed = plain.abs().sum(-1) > 0
        assert mixed.any() and (calibrated[~mixed] == 0).all()
        if normalize == "grpo":
            torch.testing.assert_close(calibrated, plain, atol=1e-6, rtol=1e-6)
            continue
        factor = (calibrated / plain)[plain != 0]
        assert factor.min() > 2 - 1e-5 and factor.max() < agents + 1e-5
        assert agents > 2 or factor.max() < 2 + 1e-5
    _, acts = function(rewards, calibrate="advantage", calibrate_weight=0.5, eps=0.0)
    _, plain = function(rewards, calibrate="none", eps=0.0)
    assert (acts - plain).abs().max() > 0.1


@BOTH
def test_calibrating_the_advantage(function):
    """The reward stays, and the clipped sum is added after the normalization, times its weight."""
    rewards = groups([1.0, 1.0], [1.0, 0.0])
    calibrated, advantage = function(rewards, calibrate="advantage", calibrate_weight=0.5, normalize="dr_grpo")
    assert torch.equal(calibrated, rewards)
    torch.testing.assert_close(advantage, groups([0.25, 0.25], [0.5 + 0, -0.5 - 0.5]))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 8), (2, 3, 5), (3, 2, 16), (5, 7, 33)], ids=str)
def test_shapes_against_truth(shape):
    for calibrate, normalize in (("reward", "grpo"), ("advantage", "dr_grpo"), ("none", "rloo")):
        for masked in (False, True):
            check_advantage(shape, calibrate, normalize, masked)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rewards_MQG", {"rewards_MQG": torch.zeros(2, 3)}),
        ("rewards_MQG", {"rewards_MQG": torch.zeros(2, 3, 4, dtype=torch.int64)}),
        ("rewards_MQG", {"rewards_MQG": torch.zeros(2, 3, 0)}),
        ("mask_MQG", {"mask_MQG": torch.ones(2, 3, 5, dtype=torch.bool)}),
        ("mask_MQG", {"mask_MQG": torch.ones(2, 3, 4)}),
        ("calibrate", {"calibrate": "always"}),
        ("normalize", {"normalize": "zscore"}),
        ("eps", {"eps": -1.0}),
    ],
)
def test_mistakes_name_the_argument(name, options):
    with pytest.raises(ValueError, match=f"^{name}"):
        calibrated_advantage(**{"rewards_MQG": torch.zeros(2, 3, 4), **options})
