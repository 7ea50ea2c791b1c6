"""One step's numbers, and the warning that trainer and engine see different distributions."""

from __future__ import annotations

from end_to_end import save_models, write_config

from ilr_fast.cli import main
from ilr_fast.steplog import diverging


def test_agents_over_the_limit_are_named_with_their_difference():
    row = {"agents": {name: {"logp_diff_mean": value} for name, value in
                      (("ada", 0.6), ("bob", 0.5), ("cleo", None))}}  # fmt: skip
    assert diverging(row, 0.5) == {"ada": 0.6}
    assert diverging(row, 1.0) == {}


def test_a_run_warns_of_each_agent_once(tmp_path, capfd):
    save_models(tmp_path / "models")
    config = write_config(tmp_path, tmp_path / "models", log__logp_warning=0.0, steps=2, interaction="none")
    assert main(["train", str(config), "--debug"]) == 0
    said = capfd.readouterr().out
    for name in ("ada", "bob"):
        assert said.count(f"warning: {name}: log-probs of trainer and engine differ by") <= 1
    assert "more than log.logp_warning = 0" in said
