"""Dialogues a step ahead: sampled while agents learn, by engines whose weights stay whole, and one update older."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from end_to_end import read_rows, save_models, write_config

from ilr_fast.agent import Agent
from ilr_fast.checkpoint import newest_good
from ilr_fast.cli import main
from ilr_fast.config_parse import load_config
from ilr_fast.engines.embedded import EmbeddedEngine
from ilr_fast.errors import RunError, UserError

AHEAD = {"rollout__ahead": True, "loss": {"importance": "token"}}


class ApartEngine(EmbeddedEngine):
    """The embedded engine on weights of its own, as vLLM's on a copy."""

    shares, residence = False, "awake"

    def __init__(self, model: Any, *arguments: Any, **named: Any):
        super().__init__(copy.deepcopy(model), *arguments, **named)
        self.trained = model

    def weights_changed(self) -> None:
        self._model.load_state_dict(self.trained.state_dict())
        super().weights_changed()

    def noise(self) -> None:
        return None

    close = EmbeddedEngine.forget


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("ilr_fast.config_check._ahead", lambda config: ())
    for name in ("EmbeddedEngine", "VllmEngine"):
        monkeypatch.setattr(f"ilr_fast.hosts.local.{name}", ApartEngine)
    return save_models(tmp_path / "models")


def train(folder: Path, models: Path, **changes: Any) -> list[str]:
    """What was said in each step of a run."""
    folder.mkdir()
    assert main(["train", str(write_config(folder, models, interaction="none", **changes)), "--debug"]) == 0
    return [path.read_text() for path in sorted((folder / "run" / "dialogues").iterdir())]


def test_dialogues_are_those_of_the_weights_before_the_last_update(tmp_path, models, monkeypatch):
    update, learners, together = Agent.update, [], threading.Barrier(2, timeout=60)

    def beside(self: Agent, *arguments: Any) -> Any:
        learners.append(threading.current_thread() is not threading.main_thread())
        if len(learners) <= 2:  # both learn at once
            together.wait()
        return update(self, *arguments)

    still = {f"agents__{name}__optimizer__lr": 0.0 for name in ("ada", "bob")}
    fixed = train(tmp_path / "fixed", models, **still)
    monkeypatch.setattr(Agent, "update", beside)
    ahead = train(tmp_path / "ahead", models, **AHEAD, **{key: 0.02 for key in still})
    assert ahead[:2] == fixed[:2] and ahead[2] != fixed[2], "the third step alone has seen the first update"
    assert learners == [True] * 4 + [False] * 2, "the last step has none after it"
    first, second, _ = (row["agents"]["ada"] for row in read_rows(tmp_path / "ahead" / "run"))
    assert first["logp_diff_max"] < 1e-3 < 0.05 < second["logp_diff_max"]
    assert first["truncated_share"] == 0 and second["truncated_share"] is not None


def test_what_fails_meanwhile_leaves_no_update_in_its_middle(tmp_path, models, monkeypatch):
    import ilr_fast.train as training

    roll_out, learned = training.roll_out, []
    update = Agent.update

    def broken(session: Any, interactions: Any, questions: Any, step: int, timer: Any) -> Any:
        if step == 2:
            raise UserError("no more", "questions", "give some")
        return roll_out(session, interactions, questions, step, timer)

    monkeypatch.setattr(training, "roll_out", broken)
    monkeypatch.setattr(Agent, "update", lambda self, *a: learned.append(update(self, *a)) or learned[-1])
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    assert main(["train", str(write_config(tmp_path, models, interaction="none", **AHEAD))]) == 2
    assert len(learned) == 2


@pytest.mark.parametrize("fails", ["begin", "end"])
def test_where_an_update_fails_none_is_left_running(tmp_path, models, monkeypatch, fails):
    from ilr_fast.hosts.local import LocalHost

    update, start, log = Agent.update, LocalHost.start_update, []

    def slow(self: Agent, *arguments: Any) -> Any:
        if self.name == "ada" and fails == "end":
            raise RunError("no gradient")
        time.sleep(0.5)
        log.append(f"{self.name} ends")
        return update(self, *arguments)

    def started(self: LocalHost, *arguments: Any) -> Any:
        if self.name == "bob" and fails == "begin":
            raise RunError("no thread")
        return start(self, *arguments)

    def close(self: LocalHost) -> None:
        log.append(f"{self.name} closes")

    monkeypatch.setattr(Agent, "update", slow)
    monkeypatch.setattr(LocalHost, "start_update", started)
    monkeypatch.setattr(LocalHost, "close", close)
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    assert main(["train", str(write_config(tmp_path, models, interaction="none", **AHEAD))]) == 1
    assert log[0] == ("ada ends" if fails == "begin" else "bob ends") and len(log) == 3


def test_an_interruption_meanwhile_keeps_the_update_that_is_done(tmp_path, models, monkeypatch):
    import ilr_fast.train as training

    roll_out = training.roll_out

    def interrupted(session: Any, interactions: Any, questions: Any, step: int, timer: Any) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return roll_out(session, interactions, questions, step, timer)

    monkeypatch.setattr(training, "roll_out", interrupted)
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    assert main(["train", str(write_config(tmp_path, models, interaction="none", **AHEAD))]) == 130
    found = newest_good(tmp_path / "run" / "checkpoints")
    assert found.step == found.state["row"]["step"] == 1


VLLM = ["agents.a.engine.name=vllm", "agents.a.engine.weights=copy", "loss.importance=token", "rollout.ahead=true"]


@pytest.mark.parametrize(
    ("change", "where", "remedy"),
    [
        ("agents.a.engine.weights=share", "agents.a.engine.weights", "copy"),
        ("agents.a.engine.weights=auto", "agents.a.engine.weights", "copy"),
        ("loss.importance=none", "rollout.ahead", "loss.importance"),
        ("agents.a.engine.sleep=cache", "agents.a.engine.sleep", "never"),
        ("agents.a.engine={}", "rollout.ahead", "vllm"),
        ("loss={importance: token, kl: k1, beta: 0.1}", "rollout.ahead", "k2"),
    ],
)
def test_what_would_sample_from_half_an_update_is_refused(tmp_path, change, where, remedy):
    file = tmp_path / "ahead.yaml"
    file.write_text("protocol: single\nagents: {a: {model: a}}\ndata: {train: a, validation: a, test: a}\n")
    assert load_config(file, VLLM).rollout.ahead
    assert load_config(file, [*VLLM, "agents.a.train=lora", "agents.a.engine.weights=share"]), "adapters are copied"
    with pytest.raises(UserError) as refused:
        load_config(file, [*VLLM, change])
    assert where in refused.value.where and remedy in refused.value.remedy
