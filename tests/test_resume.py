"""Runs that are killed or interrupted go on, and end as the run that was not; what fails is counted and skipped."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from end_to_end import read_rows, save_models, start, weights_of, without_timings, write_config

from ilr_fast.agent import Agent
from ilr_fast.cli import main
from ilr_fast.engines.embedded import EmbeddedEngine
from ilr_fast.types import Generation

STEPS = 4
LONG = {"steps": STEPS, "evaluate__every": 2, "checkpoint__every": 1, "prompts__examples": 1, "log__tensorboard": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, models):
    """The run that nothing stops, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("unbroken")
    warm = start("train", str(folder / "nothing.yaml"))  # the fork server loads the libraries
    warm.join()
    assert warm.exitcode == 2
    began = time.monotonic()
    process = start("train", str(write_config(folder, models, **LONG)))
    process.join()
    assert process.exitcode == 0
    return folder / "run", time.monotonic() - began


def same_end(run: Path, other: Path) -> None:
    """Weights, optimizer, rows, dialogues and what was measured agree bit for bit, timings aside."""
    for name in ("ada", "bob"):
        assert weights_of(run, STEPS, name) == weights_of(other, STEPS, name), name
        state = f"checkpoints/step_{STEPS:06d}/{name}.state/trainer.pt"
        assert same(torch.load(run / state), torch.load(other / state)), name
    rows, others = ([without_timings(row) for row in read_rows(r)] for r in (run, other))
    assert rows == others
    for step in range(1, STEPS + 1):
        assert dialogues(run, step) == dialogues(other, step)
    for name in ("interaction.json", "results.json"):
        assert json.loads((run / name).read_text()) == json.loads((other / name).read_text()), name


def dialogues(run: Path, step: int) -> list[dict]:
    return read_rows(run, f"dialogues/step_{step:06d}.jsonl")


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_points_it_ends_in_the_same_weights(tmp_path, models, unbroken, seed):
    whole, seconds = unbroken
    config, draw, kills = str(write_config(tmp_path, models, **LONG)), random.Random(seed), 0
    for _ in range(3):
        process = start("train", config)
        process.join(draw.uniform(0.05, 0.9) * seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills >= 1
    process = start("train", config)
    process.join()
    assert process.exitcode == 0
    same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("step", [1, 3])
def test_killed_in_the_middle_of_a_save(tmp_path, models, unbroken, step):
    config = str(write_config(tmp_path, models, **LONG))
    process = start("train", config)
    half = tmp_path / "run" / "checkpoints" / f".unfinished-new-step_{step:06d}"
    while process.is_alive() and not half.exists():
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and half.exists()
    assert main(["train", config]) == 0
    assert not list((tmp_path / "run").rglob(".unfinished-*"))
    same_end(tmp_path / "run", unbroken[0])


def test_interrupted_it_saves_exits_with_130_and_goes_on(tmp_path, models, unbroken, capfd):
    config = str(write_config(tmp_path, models, **{**LONG, "checkpoint__every": 100}))
    process = start("train", config)
    while process.is_alive() and not (tmp_path / "run" / "dialogues" / "step_000001.jsonl").exists():
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert 1 <= int(saved.name[5:]) < STEPS
    assert main(["train", config]) == 0
    assert f"going on from step {int(saved.name[5:])}" in capfd.readouterr().out
    for name in ("ada", "bob"):
        assert weights_of(tmp_path / "run", STEPS, name) == weights_of(unbroken[0], STEPS, name)


def test_more_steps_go_on_from_the_end(tmp_path, models):
    config = str(write_config(tmp_path, models, steps=1))
    assert main(["train", config]) == 0
    first = read_rows(tmp_path / "run")
    assert main(["train", config]) == 0 and read_rows(tmp_path / "run") == first  # nothing to do: nothing changes
    assert main(["train", config, "steps=2"]) == 0
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [1, 2]
    assert read_rows(tmp_path / "run")[0] == first[0]


BROKEN_VERIFIER = """
from ilr_fast.rewards.base import Adapted
from ilr_fast.rewards.number import NumberGrader


class Sometimes(NumberGrader):
    '''Breaks on a question.'''

    def grade(self, question, text):
        if question.id in {broken}:
            return self.broken(False, None, "the verifier crashed")
        return super().grade(question, text)


class Raises:
    def grade(self, question, text):
        raise KeyError("no such test")


class RaisesLater(NumberGrader):
    '''Judges the data's own answers, as a run asks of it at its start, and nothing that an agent says.'''

    def grade(self, question, text):
        if text is not question.answer:
            raise KeyError("no such test")
        return super().grade(question, text)

    def grade_many(self, pairs):
        return [Adapted(self).grade(*pair) for pair in pairs]
"""


@pytest.fixture
def verifier(tmp_path, monkeypatch):
    """Writes a module of verifiers that break on the questions named, and gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, broken):
        (tmp_path / f"{name}.py").write_text(BROKEN_VERIFIER.format(broken=broken))
        return name

    return write


def test_a_verifier_that_breaks_is_counted_logged_and_skipped(tmp_path, models, verifier):
    name = verifier("breaks_on_some", [f"q{a}{b}" for a in range(2) for b in range(10)])
    keys = {"reward__name": f"{name}:Sometimes", "max_failed_share": 1.0, "rollout__questions": 4}
    assert main(["train", str(write_config(tmp_path, models, **keys))]) == 0
    rows, failures = read_rows(tmp_path / "run"), read_rows(tmp_path / "run", "failures.jsonl")
    assert failures and sum(row["failures"] for row in rows) == len(failures)
    assert {f["kind"] for f in failures} == {"grade"} and {f["error"] for f in failures} == {"the verifier crashed"}
    assert {f["agent"] for f in failures} == {"ada", "bob"} and all(f["question"][1] in "01" for f in failures)
    broken = {(f["step"], f["question"], f["sample"]) for f in failures}
    asked = set()
    for row in rows:
        for dialogue in dialogues(tmp_path / "run", row["step"]):
            asked.add(dialogue["question"])
            left_out = (row["step"], dialogue["question"], dialogue["sample"]) in broken
            assert all((turn["advantage"] is None) == left_out for turn in dialogue["agents"]["ada"])
    assert {q for q in asked if q[1] in "01"} == {f["question"] for f in failures}


def test_a_verifier_that_raises_stops_the_run_with_everything_saved(tmp_path, models, verifier, capfd):
    name = verifier("always_raises", [])
    config = write_config(tmp_path, models, reward__name=f"{name}:Raises", interaction="none")
    assert main(["train", str(config)]) == 2 and not (tmp_path / "run").exists()
    told = capfd.readouterr().err
    assert "data.train" in told and "none of 8 questions tried can be graded" in told and "no such test" in told
    assert main(["train", str(config), f"reward.name={name}:RaisesLater"]) == 1
    told = capfd.readouterr().err
    assert "6 of 6 dialogues failed in step 1" in told and "max_failed_share" in told and "no such test" in told
    assert told.count("ilr-fast:") == 1 and "Traceback" not in told
    run = tmp_path / "run"
    assert [row["step"] for row in read_rows(run)] == [1] and (run / "checkpoints" / "step_000001").is_dir()
    assert all(f["question"].startswith("q") for f in read_rows(run, "failures.jsonl"))


def test_an_engine_request_that_fails_leaves_its_dialogue_out(tmp_path, models, monkeypatch):
    generate, asked = EmbeddedEngine.generate, []

    async def sometimes(self, tokens, sampling):
        asked.append(sampling)
        if sampling.temperature == 1.0 and len(asked) % 20 == 0:
            return Generation((), (), "error", "", "out of memory")
        return await generate(self, tokens, sampling)

    monkeypatch.setattr(EmbeddedEngine, "generate", sometimes)
    config = str(write_config(tmp_path, models, max_failed_share=1.0, interaction="none", rollout__questions=4))
    assert main(["train", config]) == 0
    run = tmp_path / "run"
    failures = read_rows(run, "failures.jsonl")
    assert failures and {f["kind"] for f in failures} == {"dialogue"}
    assert all(f["question"] and "out of memory" in f["error"] for f in failures)
    for row in read_rows(run):
        failed = [f for f in failures if f["step"] == row["step"]]
        assert row["failures"] == len(failed)
        assert len(dialogues(run, row["step"])) == 12 - len(failed)


@pytest.fixture
def nan_gradients(monkeypatch):
    """Makes ada's hidden states in training NaN at the steps that are named."""

    def broken(steps):
        at = {}

        def update(self, sequences, step, update=Agent.update):
            at[self.name] = step
            return update(self, sequences, step)

        def hidden(self, model, batch, hidden=Agent._hidden):
            hidden_ND, head = hidden(self, model, batch)
            return (hidden_ND * float("nan") if self.name == "ada" and at["ada"] in steps else hidden_ND), head

        monkeypatch.setattr(Agent, "update", update)
        monkeypatch.setattr(Agent, "_hidden", hidden)

    return broken


KL = {"loss": {"kl": "k2", "beta": 0.01}}  # so that every turn has a gradient


def test_a_nan_gradient_is_logged_and_leaves_the_weights(tmp_path, models, nan_gradients):
    nan_gradients({2})
    assert main(["train", str(write_config(tmp_path, models, **KL, checkpoint__keep=3))]) == 0
    run = tmp_path / "run"
    (failure,) = read_rows(run, "failures.jsonl")
    asked = {d["question"] for d in dialogues(run, 2)}
    assert (failure["step"], failure["kind"], failure["agent"]) == (2, "update", "ada")
    assert set(failure["question"]) == asked and "not finite" in failure["error"]
    assert weights_of(run, 2, "ada") == weights_of(run, 1, "ada") != weights_of(run, 3, "ada")
    assert weights_of(run, 2, "bob") != weights_of(run, 1, "bob")
    assert [row["failures"] for row in read_rows(run)] == [0, 1, 0]
    assert "not finite" in read_rows(run)[1]["agents"]["ada"]["skipped"]


def test_too_many_nan_gradients_stop_the_run_across_resuming(tmp_path, models, nan_gradients, capfd):
    nan_gradients(set(range(100)))
    config = str(write_config(tmp_path, models, **KL))
    assert main(["train", config, "steps=2"]) == 0  # 2 of at least 10 are not more than 0.2
    assert main(["train", config, "steps=9"]) == 1
    assert "3 of 3 updates of ada failed" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step_000003").is_dir()
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [1, 2, 3]
