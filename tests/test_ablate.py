"""The variants of an ablation, skipping what is finished, and going on with what is not."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_runs import make_run
from rich.console import Console

from ilr_fast.ablate import ablate, variants
from ilr_fast.config import (
    AgentConfig,
    Config,
    CreditConfig,
    DataConfig,
    EvaluateConfig,
    RewardConfig,
    RolloutConfig,
    calibration_is_noop,
)
from ilr_fast.config_parse import dump
from ilr_fast.errors import UserError
from ilr_fast.evaluate import method_of
from ilr_fast.runfolder import fingerprint

RATIOS = ("0", "0.25", "0.5", "0.75", "1")
NAMES = ["ilr", "ilr_di", "ilr_pc", *(f"ilr_ratio_{r}" for r in RATIOS),
         "grpo-smollm2", "grpo-gemma", "grpo_peer-smollm2", "grpo_peer-gemma"]  # fmt: skip


def config(tmp_path, **keys) -> Config:
    agents = {name: AgentConfig(model=f"models/{name}") for name in ("smollm2", "gemma")}
    data = DataConfig(train="task:largest", validation="task:largest", test="task:largest")
    return Config(**{"run": str(tmp_path / "one"), "steps": 2, "agents": agents, "data": data,
                     "evaluate": EvaluateConfig(few_shot=[4], modes=["single", "debate"]),
                     "rollout": RolloutConfig(questions=4, samples=4), **keys})  # fmt: skip


def trainer(asked, fails_at=None):
    """Stands in for training: writes the run folder that it would leave, or breaks off after one step."""

    def train(config, *, command):
        asked.append(config)
        folder = Path(config.run)
        cut_off = folder.name == fails_at
        made = make_run(folder.with_name(folder.name + ".new"), agents=tuple(config.agents), steps=1 if cut_off else 2,
                        planned=2, method=method_of(config), questions=20,
                        evaluated=not cut_off)  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
        (folder / "config.yaml").write_text(dump(config))
        if cut_off:
            raise KeyboardInterrupt
        return folder

    return train


def test_variants_change_what_they_are_named_for(tmp_path):
    base = config(tmp_path, credit=CreditConfig(calibrate="advantage"))
    made = {v.name: v for v in variants(base)}
    assert list(made) == NAMES
    assert [v.method for v in made.values()] == [*NAMES[:8], "grpo", "grpo", "grpo_peer", "grpo_peer"]
    keys = {name: (v.config.interaction, v.config.credit.calibrate, v.config.protocol) for name, v in made.items()}
    assert keys["ilr"] == ("dynamic", "advantage", "idea3") and keys["ilr_di"] == ("dynamic", "none", "idea3")
    assert keys["ilr_pc"] == ("none", "advantage", "idea3") and keys["grpo-gemma"] == ("none", "none", "single")
    assert [made[f"ilr_ratio_{r}"].config.cooperation_ratio for r in RATIOS] == [0, 0.25, 0.5, 0.75, 1]
    assert {Path(v.config.run).parent for v in made.values()} == {tmp_path / "one-ablation"}
    assert len({fingerprint(v.config) for v in made.values()}) == len(NAMES)


def test_grpo_is_alone_with_as_many_turns_and_few_shot_is_measured_once(tmp_path):
    made = {v.name: v.config for v in variants(config(tmp_path))}
    grpo = made["grpo-gemma"]
    assert list(grpo.agents) == ["gemma"] and grpo.rollout.samples == 3 * 4 and grpo.rollout.questions == 4
    assert grpo.evaluate.modes == ["single"] and made["ilr"].evaluate.modes == ["single", "debate"]
    assert [name for name, c in made.items() if c.evaluate.few_shot] == ["ilr"]
    assert [name for name, c in made.items() if c.evaluate.base] == ["ilr"]
    none = config(tmp_path, credit=CreditConfig(calibrate="none"))
    assert {v.name: v.config.credit.calibrate for v in variants(none)}["ilr"] == "reward"


def test_a_third_of_the_samples(tmp_path):
    grpo, third = (variants(config(tmp_path), [name])[1].config for name in ("grpo", "grpo_third"))
    assert third.rollout.samples == 4 and grpo.rollout.samples == 12 and list(third.agents) == ["gemma"]
    assert variants(config(tmp_path), ["grpo_third"])[1].method == "grpo_third" == third.method
    assert replace(third, run=grpo.run, rollout=grpo.rollout, method=None) == grpo


def test_a_peer_that_only_talks_has_no_grpo_run(tmp_path):
    agents = {"a": AgentConfig(model="m"), "b": AgentConfig(model="n", train="none")}
    assert [v.name for v in variants(config(tmp_path, agents=agents))][8:] == ["grpo-a", "grpo_peer-a"]


def test_a_peer_that_shows_and_is_not_rewarded(tmp_path):
    made = {v.name: v.config for v in variants(config(tmp_path, reward=RewardConfig(stage_reward="final")))}
    shown = made["grpo_peer-gemma"]
    assert (shown.protocol, shown.interaction, shown.credit.calibrate) == ("idea3", "none", "none")
    assert shown.reward.stage_reward == "own" and shown.rollout.samples == 4
    assert {name: agent.train for name, agent in shown.agents.items()} == {"smollm2": "none", "gemma": "full"}


def test_methods_and_seeds_are_chosen(tmp_path):
    base = config(tmp_path)
    made = variants(base, ["base", "grpo", "ilr_ratio_0.1", "ilr_neither"], [3, 4])
    names = ["grpo-smollm2", "grpo-gemma", "ilr_ratio_0.1", "ilr_neither"]
    assert [Path(v.config.run).name for v in made] == [f"{name}-seed{seed}" for seed in (3, 4) for name in names]
    assert [v.config.seed for v in made] == [3] * 4 + [4] * 4 and made[3].method == "ilr_neither"
    assert [v.config.evaluate.base for v in made] == [True, True, False, False] * 2  # each agent once a seed
    refused = {"ilr_ratio_1": ["ilr_rato_1"], "0 to 1": ["ilr_ratio_2"], "twice": ["ilr", "ilr"], "no method": []}
    for match, methods in refused.items():
        with pytest.raises(UserError, match=match):
            variants(base, methods)
    with pytest.raises(UserError, match="twice"):
        variants(base, seeds=[1, 1])


def test_runs_go_on_where_they_stopped_and_finished_ones_are_skipped(tmp_path):
    asked: list[Config] = []
    base = config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ablate(base, trainer(asked, fails_at="ilr_pc"), console=Console(file=io.StringIO()))
    assert [Path(c.run).name for c in asked] == NAMES[:3]
    asked.clear()
    out = io.StringIO()
    path = ablate(base, trainer(asked), command="ilr-fast ablate x", console=Console(file=out, width=150))
    assert [Path(c.run).name for c in asked] == NAMES[2:]
    assert "1 of 12: ilr, finished before" in out.getvalue()
    assert path == tmp_path / "one-ablation" / "report.html" and "grpo-gemma" in path.read_text()
    asked.clear()
    ablate(base, trainer(asked), console=Console(file=io.StringIO()))
    assert asked == []


def test_more_steps_go_on_and_missing_results_are_not_finished(tmp_path):
    base = config(tmp_path)
    ablate(base, trainer([]), console=Console(file=io.StringIO()))
    results = tmp_path / "one-ablation" / "ilr_di" / "results.json"
    rows = [r for r in json.loads(results.read_text()) if (r["agent"], r["method"]) != ("gemma", "ilr_di")]
    results.write_text(json.dumps(rows))
    asked: list[Config] = []
    ablate(base, trainer(asked), console=Console(file=io.StringIO()))
    assert [Path(c.run).name for c in asked] == ["ilr_di"]
    asked.clear()
    ablate(replace(base, steps=3), trainer(asked), console=Console(file=io.StringIO()))
    assert len(asked) == len(NAMES)


def test_errors_come_before_any_training(tmp_path):
    asked: list[Config] = []
    base = config(tmp_path)
    ablate(base, trainer([]), console=Console(file=io.StringIO()))
    with pytest.raises(UserError, match="another config"):
        ablate(replace(base, seed=7), trainer(asked), console=Console(file=io.StringIO()))
    with pytest.raises(UserError, match="single agent"):
        ablate(config(tmp_path, agents={"a": AgentConfig(model="m")}, protocol="single", interaction="none"),
               trainer(asked))
    assert asked == []


def test_the_calibration_set(tmp_path):
    made = {v.method: v.config for v in variants(config(tmp_path), ["calibration"])}
    keys = {name: (c.reward.format_weight, c.credit.calibrate, c.credit.advantage) for name, c in made.items()}
    assert keys == {
        "cal_binary": (0, "none", "grpo"), "cal_binary_reward": (0, "reward", "grpo"),
        "cal_binary_advantage": (0, "advantage", "grpo"), "cal_graded": (0.1, "none", "grpo"),
        "cal_graded_reward": (0.1, "reward", "grpo"), "cal_graded_advantage": (0.1, "advantage", "grpo"),
        "cal_dr_grpo": (0, "none", "dr_grpo"), "cal_dr_grpo_reward": (0, "reward", "dr_grpo"),
    }  # fmt: skip
    assert calibration_is_noop(made["cal_binary_reward"]) and not calibration_is_noop(made["cal_graded_reward"])
