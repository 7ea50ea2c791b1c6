"""A run with rewards of two values, with calibration and without: the same advantages up to ε, the same curve."""

from __future__ import annotations

import pytest
import torch
from end_to_end import read_rows, save_models, weights_of, write_config
from safetensors.torch import load

from ilr_fast.cli import main
from ilr_fast.runfolder import read_dialogues

STEPS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run folders by (format_weight, calibrate)."""
    folder = tmp_path_factory.mktemp("calibration")
    models, made = save_models(folder), {}
    for weight, calibrate in ((0.0, "none"), (0.0, "reward"), (0.1, "reward")):
        run = folder / f"{weight}-{calibrate}"
        file = write_config(folder, models, run=str(run), steps=STEPS, interaction="none", reward__format_weight=weight,
                            credit={"calibrate": calibrate}, rollout__samples=6)  # fmt: skip
        assert main(["train", str(file)]) == 0
        made[weight, calibrate] = run
    return made


def advantages(run, step):
    return torch.tensor([a for one in read_dialogues(run, step) for values in one.advantages.values() for a in values])


def texts(run, step):
    return [turn.generation.tokens for one in read_dialogues(run, step)
            for turns in one.scored.dialogue.turns.values() for turn in turns]  # fmt: skip


def test_two_values_learn_the_same_with_and_without(runs):
    plain, calibrated = runs[0.0, "none"], runs[0.0, "reward"]
    first = advantages(plain, 1)
    assert first.abs().max() > 0.5, "some group has right and wrong answers"
    assert (advantages(calibrated, 1) - first).abs().max() < 1e-3
    for step in range(1, STEPS + 1):
        assert texts(plain, step) == texts(calibrated, step)
    for row, other in zip(read_rows(plain), read_rows(calibrated), strict=True):
        for name, agent in row["agents"].items():
            assert agent["accuracy"] == other["agents"][name]["accuracy"]
    for name in ("ada", "bob"):
        one, other = (load(weights_of(run, STEPS, name)) for run in (plain, calibrated))
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-5


def test_graded_rewards_do_not(runs):
    """The same first dialogues, but other advantages: the form of an answer counts too."""
    plain, graded = runs[0.0, "none"], runs[0.1, "reward"]
    assert texts(plain, 1) == texts(graded, 1)
    assert (advantages(plain, 1) - advantages(graded, 1)).abs().max() > 0.05
