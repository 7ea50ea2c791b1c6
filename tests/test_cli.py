"""Exit statuses, and one message that says what, where and what to do for every mistake, before a model is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from end_to_end import agent, save_models, write_config

import ilr_fast.hosts.local
from ilr_fast.cli import COMMANDS, main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def no_weights(monkeypatch):
    """Nothing may load a model."""
    loaded = []
    monkeypatch.setattr(ilr_fast.hosts.local, "open_host", lambda *_: loaded.append(1))
    yield
    assert not loaded, "a model was loaded before the mistake was seen"


@pytest.fixture
def told(capfd):
    """Checks the one message of the last command, and gives it."""

    def message() -> str:
        captured = capfd.readouterr()
        lines = captured.err.strip().splitlines()
        assert sum(line.startswith("ilr-fast: ") for line in lines) == 1, captured.err
        assert len(lines) == 2 and lines[1].startswith("  → "), captured.err
        assert "Traceback" not in captured.err + captured.out
        return captured.err

    return message


def written(folder, name, text):
    file = folder / name
    file.write_text(text)
    return str(file)


ROW = json.dumps({"question": "1 + 1?", "answer": "2"})

# what is changed in the config, and what the message must name
CONFIG_MISTAKES = {
    "unknown key": ({"rollout__sampels": 4}, ["rollout.sampels", "did you mean 'samples'"]),
    "unknown agent key": ({"agents__ada__optimizer": {"lrr": 1}}, ["agents.ada.optimizer.lrr", "'lr'"]),
    "wrong type": ({"steps": "many"}, ["steps", "'many'"]),
    "out of range": ({"interaction": "ratio", "cooperation_ratio": 1.5}, ["cooperation_ratio", "1.5"]),
    "unknown choice": ({"loss": {"kl": "k4"}}, ["loss.kl", "k4"]),
    "top-p": ({"rollout__top_p": 0.9}, ["rollout.top_p", "leave it at 1"]),
    "group of one": ({"rollout__samples": 1}, ["rollout.samples", "group of one"]),
    "crossed clips": ({"loss": {"dual_clip": 1.1}}, ["loss.dual_clip", "crossed"]),
    "no agents": ({"agents": {}}, ["agents", "no agents"]),
    "nobody learns": ({"agents__ada__train": "none", "agents__bob__train": "none"}, ["no agent is trained"]),
    "no model folder": ({"agents__ada__model": "nowhere/at-all"}, ["nowhere/at-all"]),
    "no chat template": ({"agents__bob__chat_template": None}, ["agents.bob.chat_template", "plain"]),
    "context": ({"agents__ada__engine": {"max_context": 64}}, ["context of ada has 64", "max_context"]),
    "no data": ({"data__train": None}, ["data.train", "no questions"]),
    "unknown grader": ({"reward__name": "numbr"}, ["reward.name", "did you mean 'number'"]),
    "unknown protocol": ({"protocol": "idea4"}, ["protocol", "idea3"]),
    "unknown mode": ({"evaluate__modes": ["idea"]}, ["evaluate.modes", "idea"]),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_mistakes_in_the_config(tmp_path, models, no_weights, told, mistake):
    changes, parts = CONFIG_MISTAKES[mistake]
    assert main(["train", str(write_config(tmp_path, models, **changes))]) == 2
    message = told()
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


DATA_MISTAKES = {
    "missing": (None, ["data.train", "no file"]),
    "empty": ("", ["data.train", "no rows"]),
    "broken JSON": (f'{ROW}\n{ROW}\n{{"question": "2"', ["mine.jsonl:3"]),
    "no answer": (f'{ROW}\n{{"question": "2 + 2?"}}\n', ["mine.jsonl:2", "answer"]),
    "no question": (f'{{"answer": "4"}}\n{ROW}\n', ["mine.jsonl:1", "question"]),
}


@pytest.mark.parametrize("mistake", DATA_MISTAKES)
def test_mistakes_in_the_data(tmp_path, models, no_weights, told, mistake):
    text, parts = DATA_MISTAKES[mistake]
    file = str(tmp_path / "mine.jsonl") if text is None else written(tmp_path, "mine.jsonl", text)
    assert main(["train", str(write_config(tmp_path, models)), f"data.train={file}"]) == 2
    message = told()
    assert all(part in message for part in parts) and "mine" in message, message
    assert not (tmp_path / "run").exists()


def test_held_out_questions_are_not_trained_on(tmp_path, models, no_weights, told):
    config = write_config(tmp_path, models)
    assert main(["train", str(config), f"data.test={tmp_path / 'train.jsonl'}"]) == 2
    assert "data.test" in told()


def test_fewer_questions_than_a_step_takes(tmp_path, models, no_weights, told):
    assert main(["train", str(write_config(tmp_path, models)), "rollout.questions=31"]) == 2
    message = told()
    assert "rollout.questions" in message and "30" in message


def test_two_agents_of_one_name(tmp_path, models, no_weights, told):
    one = json.dumps(agent(models))
    file = written(tmp_path, "twice.yaml", f"agents:\n  ada: {one}\n  ada: {one}\n")
    assert main(["train", file]) == 2
    assert "ada" in told()


@pytest.mark.parametrize("text", ["agents: [", "- a list", ""])
def test_a_config_that_is_none(tmp_path, no_weights, told, text):
    assert main(["train", written(tmp_path, "odd.yaml", text)]) == 2
    assert "odd.yaml" in told()


def test_a_model_folder_that_is_cut_short(tmp_path, models, no_weights, told):
    broken = tmp_path / "broken"
    shutil.copytree(models / "ada", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["train", str(write_config(tmp_path, models)), f"agents.ada.model={broken}"]) == 2
    assert "model.safetensors" in told()


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["trian", "x.yaml"], ["unknown command 'trian'", "did you mean 'train'"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml"]),
        (["show", "nowhere"], ["nowhere"]),
        (["report", "nowhere"], ["nowhere"]),
        (["get-model", "smolm2"], ["smolm2", "smollm2-135m-instruct"]),
        (["train", "x.yaml", "--frsh"], ["--frsh"]),
        (["train"], ["CONFIG"]),
        (["eval", "nowhere", "--benchmarks", "gsm8k"], ["nowhere"]),
    ],
)
def test_mistakes_on_the_command_line(arguments, parts, told, no_weights):
    try:
        status = main(arguments)
    except SystemExit as end:  # argparse's own way
        status = end.code
    assert status == 2
    message = told()
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(("keys", "parts"), [
    (["reward.name=choice"], ("data.train, reward.name = choice", "none of the options")),
    (["reward.name=code"], ("reward.name = code", "no tests (test_list)")),
    (["difficulty.estimator=level"], ("difficulty.estimator = level", "has no level")),
])  # fmt: skip
def test_data_that_do_not_fit_are_refused_before_anything_is_loaded_or_made(tmp_path, models, keys, parts, told,
                                                                            no_weights):  # fmt: skip
    assert main(["train", str(write_config(tmp_path, models)), *keys]) == 2
    message = told()
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [["report", "RUN", "--out"], ["report", "RUN", "--figures"], ["eval", "RUN", "--benchmarks", "test", "--out"],
     ["difficulty", "RUN/config.yaml", "--out"], ["bench", "graders", "--quick", "--out"]],
)  # fmt: skip
def test_a_place_that_cant_be_written_is_refused_before_anything_is_done(tmp_path, arguments, told, no_weights):
    (tmp_path / "file").write_text("")
    data = "data: {train: a, validation: a, test: a}"
    (tmp_path / "config.yaml").write_text(f"protocol: single\nagents: {{ada: {{model: ada}}}}\n{data}\n")
    assert main([*(a.replace("RUN", str(tmp_path)) for a in arguments), str(tmp_path / "file" / "out")]) == 2
    assert f"{tmp_path / 'file'} is a file, not a folder" in told()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        main(["train", str(tmp_path / "nowhere.yaml"), "--debug"])


@pytest.fixture(scope="module")
def run(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("one")
    assert main(["train", str(write_config(folder, models, steps=1))]) == 0
    return folder


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run beside its config, which points to it."""
    shutil.copytree(run, tmp_path / "one", symlinks=True)
    config = tmp_path / "one" / "config.yaml"
    config.write_text(config.read_text().replace(str(run), str(tmp_path / "one")))
    return tmp_path / "one"


def test_fresh_refuses_an_existing_folder_and_keys_may_follow_an_option(copied, told, no_weights):
    before = sorted(p.name for p in (copied / "run").iterdir())
    assert main(["train", str(copied / "config.yaml"), "--fresh", "steps=2"]) == 2
    assert "--fresh" in told() and before == sorted(p.name for p in (copied / "run").iterdir())
    assert main(["train", str(copied / "config.yaml"), "--fresh", "stesp=2"]) == 2
    assert "stesp" in told()


def test_the_folder_of_another_run(run, models, told, no_weights):
    assert main(["train", str(run / "config.yaml"), "seed=5"]) == 2
    message = told()
    assert "another run" in message and "seed is 0 there, 5 here" in message


def test_a_folder_of_other_things(tmp_path, models, told, no_weights):
    (tmp_path / "run").mkdir()
    written(tmp_path / "run", "thesis.txt", "years of work")
    assert main(["train", str(write_config(tmp_path, models))]) == 2
    assert "thesis.txt" in told() and [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_truncated_checkpoint(tmp_path, models, told, capfd):
    config = str(write_config(tmp_path, models, steps=1))
    assert main(["train", config]) == 0
    weights = tmp_path / "run" / "checkpoints" / "step_000001" / "ada" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    capfd.readouterr()
    assert main(["train", config, "steps=2"]) == 2
    message = told()
    assert "no checkpoint can be read" in message and "model.safetensors" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def test_help_is_printed(capsys):
    for arguments in (["--help"], *([name, "--help"] for name in COMMANDS)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert "usage: ilr-fast" in out and "%%" not in out
    with pytest.raises(SystemExit):
        main(["-h"])
    assert "95% intervals" in capsys.readouterr().out


def test_nothing_but_vllms_sampler_needs_triton():
    code = """
import importlib, pkgutil, sys
sys.modules["triton"] = None  # an import of it now fails
import ilr_fast
failed = []
for module in pkgutil.walk_packages(ilr_fast.__path__, "ilr_fast."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        failed.append(f"{module.name}: {error}")
print(*failed, sep="\\n")
"""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.split("\n") if line] == ["ilr_fast.engines.vllm_sampler"]
