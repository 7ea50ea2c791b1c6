"""interaction.json: what is measured, that a run that goes on uses it, and measuring ability again."""

from __future__ import annotations

import json
import shutil

import pytest
from end_to_end import read_rows, save_models, write_config

import ilr_fast.interaction
from ilr_fast.ability import ability, logit
from ilr_fast.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def found(folder):
    return json.loads((folder / "run" / "interaction.json").read_text())


@pytest.fixture
def measured(monkeypatch):
    """Counts what is measured."""
    counts = {"ability": 0, "pass rates": 0}
    answers = ilr_fast.interaction._answers

    def counted(session, name, questions, samples, temperature, what):
        counts[what] += 1
        return answers(session, name, questions, samples, temperature, what)

    monkeypatch.setattr(ilr_fast.interaction, "_answers", counted)
    return counts


def test_what_is_measured_is_written_down_and_decides(tmp_path, models, measured):
    assert main(["train", str(write_config(tmp_path, models, steps=2))]) == 0
    said = found(tmp_path)
    assert measured == {"ability": 2, "pass rates": 2}
    (row,) = said["abilities"]
    assert (row["step"], row["questions"]) == (0, 6) and set(row["accuracy"]) == {"ada", "bob"}
    for name in ("ada", "bob"):
        assert row["ability"][name] == pytest.approx(ability(round(row["accuracy"][name] * 6), 6))
    asked = {d["question"] for n in (1, 2) for d in read_rows(tmp_path / "run", f"dialogues/step_00000{n}.jsonl")}
    assert set(said["difficulty"]["ada"]) == asked == set(said["pass_rate"])
    assert said["difficulty"]["ada"] == said["difficulty"]["bob"]
    for question, rate in said["pass_rate"].items():  # 2 agents × 2 samples, half a success and half a failure
        assert said["difficulty"]["ada"][question] == pytest.approx(logit(1 - (rate * 4 + 0.5) / 5) / 1.7)
    shares = dict.fromkeys(("ada", "bob"), 0)
    for n in (1, 2):
        for dialogue in read_rows(tmp_path / "run", f"dialogues/step_00000{n}.jsonl"):
            for name, turns in dialogue["agents"].items():
                weaker = row["ability"][name] < said["difficulty"][name][dialogue["question"]]
                assert {turn["interaction"] for turn in turns} == {"cooperation" if weaker else "competition"}
                shares[name] += weaker / (len(asked) * 3)
    assert said["cooperation_share"] == pytest.approx(shares)
    assert said["template_rewrites"] == []


@pytest.mark.parametrize("lost", ["checkpoints/step_000003", "checkpoints"])
def test_a_run_that_goes_on_uses_what_was_measured(tmp_path, models, measured, lost):
    """Also one that was cut off before its first checkpoint."""
    config = str(write_config(tmp_path, models, steps=3))
    assert main(["train", config]) == 0
    before = found(tmp_path)
    shutil.rmtree(tmp_path / "run" / lost)
    measured.update({"ability": 0, "pass rates": 0})
    assert main(["train", config]) == 0
    assert measured == {"ability": 0, "pass rates": 0} and found(tmp_path) == before


def test_ability_is_measured_again_where_it_is_asked_for(tmp_path, models, measured):
    config = str(write_config(tmp_path, models, steps=4, ability__refresh_every=2))
    assert main(["train", config]) == 0
    assert [row["step"] for row in found(tmp_path)["abilities"]] == [0, 2]
    assert measured == {"ability": 4, "pass rates": 2}
    assert main(["train", config, "steps=5"]) == 0
    assert [row["step"] for row in found(tmp_path)["abilities"]] == [0, 2, 4]
    assert measured["ability"] == 6


def test_more_steps_ask_questions_that_were_not_measured(tmp_path, models):
    """The difficulty of questions that only the later steps ask is measured when they are."""
    config = str(write_config(tmp_path, models, steps=1))
    assert main(["train", config]) == 0
    first = found(tmp_path)["difficulty"]["ada"]
    assert main(["train", config, "steps=3"]) == 0
    later = found(tmp_path)["difficulty"]["ada"]
    assert {d["question"] for d in read_rows(tmp_path / "run", "dialogues/step_000003.jsonl")} <= set(later)
    assert {q: later[q] for q in first} == first


@pytest.mark.parametrize("text", ["{", "[]", '{"abilities": []}'])
def test_a_damaged_file_is_the_users_to_mend(tmp_path, models, text, capfd):
    config = str(write_config(tmp_path, models, steps=1))
    assert main(["train", config]) == 0
    (tmp_path / "run" / "interaction.json").write_text(text)
    capfd.readouterr()
    assert main(["train", config, "steps=2"]) == 2
    told = capfd.readouterr().err
    assert "interaction.json" in told and "can't be read" in told and "→" in told
