"""One step's numbers, and the warning that trainer and engine see different distributions."""

from __future__ import annotations

from end_to_end import save_models, write_config

from ilr_fast.cli import main
from ilr_fast.config import LogConfig
from ilr_fast.steplog import diverging


def test_agents_over_the_limit_are_named_with_their_difference():
    keys = ("logp_diff_mean", "logp_diff_max", "truncated_share")
    agents = {"ada": (0.6, 9.0, None), "bob": (0.5, 1.0, 0.1), "cleo": (None,) * 3, "dan": (0.1, 1.5, 0.3)}
    row = {"step": 3, "agents": {name: dict(zip(keys, values, strict=True)) for name, values in agents.items()}}
    found = diverging(row, LogConfig())
    assert list(found) == ["ada", "dan"]
    assert "differ by 0.6 on average in step 3, more than log.logp_warning = 0.5" in found["ada"]
    assert "0.3 of the importance weights" in found["dan"] and "log.truncated_warning = 0.1" in found["dan"]
    assert list(diverging(row, LogConfig(logp_warning=1, logp_warning_max=1.2))) == ["ada", "dan"]
    assert "log.logp_warning_max = 1.2" in diverging(row, LogConfig(logp_warning=1, logp_warning_max=1.2))["dan"]
    assert diverging(row, LogConfig(logp_warning=1, logp_warning_max=None, truncated_warning=1)) == {}
    assert "0.1 in step 3, and its engine is exact" in diverging({**row, "agents": {"dan": {"logp_diff_max": 0.1}}},
                                                                 LogConfig(), exact=["dan"])["dan"]  # fmt: skip
    assert diverging({**row, "agents": {"dan": {"logp_diff_max": 0.0}}}, LogConfig(), exact=["dan"]) == {}


def test_a_run_warns_of_each_agent_once(tmp_path, capfd):
    save_models(tmp_path / "models")
    config = write_config(tmp_path, tmp_path / "models", log__logp_warning=0.0, steps=2, interaction="none")
    assert main(["train", str(config), "--debug"]) == 0
    said = capfd.readouterr().out
    for name in ("ada", "bob"):
        assert said.count(f"warning: {name}: log-probs of trainer and engine differ by") <= 1
    assert "more than log.logp_warning = 0" in said
