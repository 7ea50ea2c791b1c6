"""`ilr-fast train` from a config to the run folder, on tiny random models of two vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from end_to_end import agent, read_rows, said_in, save_models, weights_of, without_timings, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from ilr_fast import heldout
from ilr_fast.cli import main
from ilr_fast.config_parse import load_config
from ilr_fast.errors import UserError
from ilr_fast.runfolder import RunFolder
from ilr_fast.session import prepare

SECONDS = {"generate", "reward", "train", "sync", "swap", "checkpoint", "evaluate", "other", "total"}
AGENT_KEYS = {
    "accuracy", "reward", "calibrated_reward", "groups", "groups_dropped", "cooperation_share", "loss", "entropy",
    "kl_reference", "logp_diff_mean", "logp_diff_max", "engine_noise", "clip_share", "truncated_share", "grad_norm",
    "lr", "memory_peak_gib", "tokens_per_second", "validation_accuracy",
}  # fmt: skip
RESULT_KEYS = {"agent", "method", "benchmark", "mode", "n", "correct", "accuracy", "ci95", "samples", "seed",
               "checkpoint", "tokens_mean"}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def train(folder: Path, models: Path, **changes) -> Path:
    """Runs a config through the command line; its run folder."""
    folder.mkdir(exist_ok=True)
    assert main(["train", str(write_config(folder, models, **changes)), "--debug"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory, models):
    """Two agents, Idea3, dynamic interaction by pass rates, three steps."""
    return train(tmp_path_factory.mktemp("runs"), models, evaluate__few_shot=[2], evaluate__every=2)


def test_the_run_folder_holds_what_the_contract_says(run):
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "results.json", "report.html", "interaction.json"):
        assert (run / name).stat().st_size > 0, name
    assert sorted(p.name for p in (run / "dialogues").iterdir()) == [f"step_00000{n}.jsonl" for n in (1, 2, 3)]
    assert list((run / "tensorboard").iterdir())
    environment = json.loads((run / "environment.json").read_text())
    assert {"device", "driver", "versions", "commit", "command"} <= set(environment)
    assert load_config(run / "config.yaml").steps == 3
    assert not list(run.rglob(".unfinished-*")) and not (run / "failures.jsonl").exists()


def test_metrics_rows_have_every_key_and_null_for_what_does_not_exist(run):
    rows = read_rows(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row["seconds"]) == SECONDS and row["failures"] == 0
        assert {"prompt", "generated", "trained", "dropped"} <= set(row["tokens"])
        assert row["tokens"]["trained"] + row["tokens"]["dropped"] == row["tokens"]["generated"] > 0
        assert row["seconds"]["swap"] is None and row["seconds"]["total"] > 0
        for name, values in row["agents"].items():
            assert set(values) >= AGENT_KEYS, name
            assert set(values["accuracy"]) == {"sharing", "analysis", "fusion"}
            assert values["kl_reference"] is None and values["groups"] == 6
            assert (values["validation_accuracy"] is not None) == (row["step"] in (2, 3))
            assert (values["loss"] is None) == (values["skipped"] is not None)
            if values["loss"] is not None:
                assert values["logp_diff_max"] < 1e-4 and values["grad_norm"] > 0 and values["lr"] == 1e-4
    assert [row["seconds"]["evaluate"] is None for row in rows] == [True, False, False]
    assert any(row["agents"][name]["loss"] is not None for row in rows for name in ("ada", "bob"))


def test_checkpoints_load_with_transformers_and_have_moved(run, models):
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best", "step_000002", "step_000003"]
    for name in ("ada", "bob"):
        folder = run / "checkpoints" / "step_000003" / name
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
        assert weights_of(run, 3, name) != (models / name / "model.safetensors").read_bytes()
    assert len(AutoTokenizer.from_pretrained(models / "ada")) != len(AutoTokenizer.from_pretrained(models / "bob"))


def test_results_have_base_few_shot_and_trained_rows_of_every_agent(run):
    rows = json.loads((run / "results.json").read_text())
    assert all(set(row) >= RESULT_KEYS for row in rows)
    found = {(r["agent"], r["method"], r["mode"], r["n"], r["checkpoint"]) for r in rows}
    assert found == {
        (name, method, "single", 8, "step_000003" if method == "ilr" else None)
        for name in ("ada", "bob") for method in ("base", "base_few_shot", "ilr")
    }  # fmt: skip


def test_show_and_report_read_the_run(run, capsys):
    assert main(["show", str(run), "--step", "2"]) == 0
    shown = capsys.readouterr().out
    assert "sharing" in shown and "fusion" in shown and "ada" in shown and "advantage" in shown
    dialogue = read_rows(run, "dialogues/step_000001.jsonl")[0]
    assert main(["show", str(run), "--step", "1", "--question", dialogue["question"]]) == 0
    assert dialogue["text"] in capsys.readouterr().out
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert "bob" in (run / "report.html").read_text()


def test_one_agent_alone_is_grpo(tmp_path, models):
    alone = {"agents": {"bob": agent(models, "bob")}, "protocol": "single", "interaction": "none"}
    run = train(tmp_path, models, **alone, steps=1)
    (row,) = read_rows(run)
    values = row["agents"]["bob"]
    assert set(values["accuracy"]) == {"single"} and values["groups"] == 2 and values["cooperation_share"] is None
    assert values["reward"] == pytest.approx(values["calibrated_reward"])
    assert {r["method"] for r in json.loads((run / "results.json").read_text())} == {"base", "grpo"}
    said = json.loads((run / "interaction.json").read_text())
    assert said == {"template_rewrites": []}


def test_three_agents_with_adapters_and_a_peer_that_only_talks(tmp_path, models):
    agents = {"ada": agent(models), "bob": agent(models, "bob", train="lora", lora={"rank": 2}),
              "eve": agent(models, "bob", train="none")}  # fmt: skip
    run = train(tmp_path, models, agents=agents, steps=2, rollout__show_peer_analyses=True)
    rows = read_rows(run)
    assert all(set(row["agents"]) == {"ada", "bob", "eve"} for row in rows)
    assert all(row["agents"]["eve"]["loss"] is None and row["agents"]["eve"]["groups"] == 6 for row in rows)
    assert rows[-1]["agents"]["eve"]["validation_accuracy"] is None
    folder = run / "checkpoints" / "step_000002"
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["ada", "ada.state", "bob", "bob.state"]
    assert (folder / "bob" / "adapter_config.json").exists()
    adapted = AutoModelForCausalLM.from_pretrained(folder / "bob")
    assert any("lora" in name for name, _ in adapted.named_parameters())
    assert {r["agent"] for r in json.loads((run / "results.json").read_text())} == {"ada", "bob", "eve"}


def test_what_is_measured_after_training_is_written_mode_by_mode(tmp_path, models, monkeypatch):
    evaluate = heldout.evaluate_agents

    def cut_off(*arguments, **named):
        if "debate" in named["modes"]:
            raise KeyboardInterrupt
        return evaluate(*arguments, **named)

    monkeypatch.setattr(heldout, "evaluate_agents", cut_off)
    after = {"base": False, "modes": ["single", "debate"]}
    config = write_config(tmp_path, models, steps=1, interaction="none", evaluate=after)
    assert main(["train", str(config)]) == 130
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {(row["agent"], row["mode"]) for row in rows} == {("ada", "single"), ("bob", "single")}


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_a_kl_to_the_reference(tmp_path, models, kl):
    """k1 acts in the reward: rewards are graded by it, and the loss has no KL; k2 and k3 act in the loss."""
    run = train(tmp_path, models, loss={"kl": kl, "beta": 0.05}, steps=2)
    first, second = (row["agents"]["ada"] for row in read_rows(run))
    dialogues = read_rows(run, "dialogues/step_000002.jsonl")
    rewards = {turn["reward"] for dialogue in dialogues for turn in dialogue["agents"]["ada"]}
    graded = {0.0, 0.1, 1.0, 1.1}
    if kl == "k1":
        assert first["kl_reference"] is None and second["kl_reference"] is None
        assert not all(any(abs(r - g) < 1e-9 for g in graded) for r in rewards)
    else:
        assert first["kl_reference"] == pytest.approx(0, abs=1e-6) and second["kl_reference"] > 1e-6
        assert second["groups_dropped"] < second["groups"] or second["loss"] is not None
        assert read_rows(run)[1]["tokens"]["dropped"] == 0  # with a KL, turns of advantage 0 have a gradient too


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_ratio_of_cooperation_needs_no_measurement(tmp_path, models, share):
    run = train(tmp_path, models, interaction="ratio", cooperation_ratio=share, steps=1)
    (row,) = read_rows(run)
    assert {values["cooperation_share"] for values in row["agents"].values()} == {share}
    assert "difficulty" not in json.loads((run / "interaction.json").read_text())
    methods = {r["method"] for r in json.loads((run / "results.json").read_text())}
    assert methods == {"base", f"ilr_ratio_{share:g}"}


def test_several_updates_of_a_rollout(tmp_path, models):
    run = train(tmp_path, models, loss={"epochs": 2, "minibatches": 2, "ratio": "sequence"}, steps=1)
    (row,) = read_rows(run)
    assert any(values["clip_share"] is not None for values in row["agents"].values())


def test_dialogues_that_cannot_be_written_beside_the_update_end_the_run(tmp_path, models, monkeypatch, capsys):
    def full(self, step, credited):
        raise UserError("the disk is full", str(self.path), "free some space")

    monkeypatch.setattr(RunFolder, "write_dialogues", full)
    assert main(["train", str(write_config(tmp_path, models, steps=2, interaction="none"))]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert read_rows(tmp_path / "run") == []


SHIPPED = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(file.parents[2])))
def test_shipped_configs_load(file):
    config = load_config(file)
    assert config.agents and config.steps >= 1


@pytest.mark.parametrize("file", [f for f in SHIPPED if f.parent.name == "cpu"], ids=lambda file: file.stem)
def test_shipped_cpu_configs_run_shortened_with_tiny_models(tmp_path, models, file):
    names = list(load_config(file).agents)
    tiny = [f"agents.{name}.model={models / folder}" for name, folder in zip(names, ("ada", "bob"), strict=False)]
    short = ["steps=1", f"run={tmp_path / 'run'}", "rollout.questions=2", "rollout.samples=2", "data.train_size=20",
             "data.validation_size=4", "data.test_size=4", "difficulty.samples=1", "evaluate.few_shot=[2]"]  # fmt: skip
    assert main(["train", str(file), *tiny, *short, "--debug"]) == 0
    (row,) = read_rows(tmp_path / "run")
    assert list(row["agents"]) == names


@pytest.mark.models
@pytest.mark.parametrize("file", [f for f in SHIPPED if f.parent.name == "cpu"], ids=lambda file: file.stem)
def test_shipped_cpu_configs_take_a_step_with_the_real_models(tmp_path, file):
    from ilr_fast.models import cache_folder

    if not (cache_folder() / "models").is_dir():
        pytest.skip("the real models have not been fetched (ilr-fast get-model)")
    short = ["steps=1", f"run={tmp_path / 'run'}", "rollout.questions=1", "rollout.samples=2", "data.train_size=20",
             "data.validation_size=2", "data.test_size=2", "difficulty.samples=1", "evaluate.few_shot=[2]",
             "ability.questions=2"]  # fmt: skip
    assert main(["train", str(file), *short, "--debug"]) == 0
    assert len(read_rows(tmp_path / "run")) == 1


def test_what_can_be_checked_is_checked_without_weights(tmp_path, models, monkeypatch):
    """`prepare` reads questions, templates and tokenizers, and no model."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    ready = prepare(load_config(write_config(tmp_path, models)))
    assert set(ready.chats) == {"ada", "bob"} and len(ready.splits["train"]) == 30


def test_benchmarks_beside_the_test_set_are_not_trained_on(tmp_path, models):
    config = write_config(tmp_path, models, evaluate={"benchmarks": ["task:sums"], "benchmark_limit": 5})
    (sums,) = prepare(load_config(config)).benchmarks
    assert sums.benchmark == "task:sums" and len(sums.questions) == 5 and sums.config.reward.name == "number"
    trained = f"evaluate.benchmarks=[{tmp_path / 'train.jsonl'}]"
    with pytest.raises(UserError, match="evaluate.benchmarks.*the same id"):
        prepare(load_config(config, [trained]))


def test_questions_without_a_gradient_are_replaced_and_a_run_repeats(tmp_path, models):
    changes = dict(rollout__refill=2, rollout__samples=3, rollout__stop_after_equal=2, steps=2, deterministic=True)
    runs = [train(tmp_path / name, models, **changes) for name in ("a", "b")]
    rows = [[without_timings(row) for row in read_rows(run)] for run in runs]
    assert rows[0] == rows[1]
    assert all(sum(row["questions"][what] for row in rows[0]) > 0 for what in ("replaced", "stopped"))
    for step in (1, 2):
        assert said_in(runs[0], step) == said_in(runs[1], step)
        asked = [json.loads(line) for line in (runs[0] / "dialogues" / f"step_00000{step}.jsonl").open()]
        assert len({row["question"] for row in asked}) == load_config(runs[0] / "config.yaml").rollout.questions
