"""`ilr-fast eval` on tiny random models: runs by their best checkpoint, models by folder, alone and together."""

from __future__ import annotations

import io
import json

import pytest
from learners import save_model, words
from rich.console import Console

from ilr_fast import evaluate_targets
from ilr_fast.chat import ChatFormat
from ilr_fast.checkpoint import save
from ilr_fast.config import (
    AgentConfig,
    Config,
    DataConfig,
    EngineConfig,
    LoraConfig,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
)  # fmt: skip
from ilr_fast.config_parse import dump, load_config
from ilr_fast.errors import UserError
from ilr_fast.evaluate_command import evaluate_command
from ilr_fast.evaluate_targets import read_targets
from ilr_fast.hosts.local import open_host

ROWS = [{"id": f"q{n}", "question": f"{n} + 7", "answer": str(n + 7)} for n in range(5)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gemma3"):
        save_model(folder, name)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def make_run(folder, models, questions, names=("ada", "bob"), train="full"):
    """A run folder with one checkpoint of agents that were trained for no step."""
    agents = {
        name: AgentConfig(model=str(models / model), chat_template="plain", device="cpu", train=train,
                          lora=LoraConfig(rank=2))
        for name, model in zip(names, ("llama", "gemma3"), strict=True)
    }  # fmt: skip
    config = Config(
        run=str(folder), agents=agents, prompts=PromptConfig(file="short"), reward=RewardConfig(name="number"),
        data=DataConfig(train="task:largest", validation="task:largest", test=questions),
        rollout=RolloutConfig(max_tokens={"default": 4}, peer_tokens=4),
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(config))
    hosts = {name: open_host(name, agent, config, ChatFormat(words(), "plain")) for name, agent in agents.items()}
    save(folder / "checkpoints", 4, hosts, {}, keep=1, score=0.5)
    return folder


def run_command(targets, **options):
    out = io.StringIO()
    rows = evaluate_command([str(t) for t in targets], console=Console(file=out, width=160), **options)
    return rows, out.getvalue()


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory, models, questions):
    return make_run(tmp_path_factory.mktemp("runs") / "one", models, questions)


def test_a_run_is_measured_at_its_best_checkpoint(run, questions):
    rows, printed = run_command([run], benchmarks=[questions], modes=["single", "debate", "idea3"], limit=3)
    assert [(r["agent"], r["mode"]) for r in rows] == [
        (a, m) for m in ("single", "debate", "idea3") for a in ("ada", "bob")
    ]  # fmt: skip
    row = rows[0]
    assert (row["method"], row["checkpoint"], row["n"], row["samples"]) == ("ilr", "step_000004", 3, 1)
    assert row["benchmark"] == f"{questions}[:3]" and row["ci95"] is not None and row["tokens_mean"] > 0
    assert results(run) == [json.loads(json.dumps(r)) for r in rows]
    assert (run / row["outcomes"]).is_file()
    assert "ada" in printed and "recorded in" in printed
    assert [bool(r.get("against_single")) for r in rows] == [False] * 2 + [True] * 4
    assert "against the same agent alone" in printed and "won" in printed


def test_models_by_folder_are_only_recorded_where_asked(models, questions, tmp_path):
    options = {"benchmarks": [questions], "samples": 2,
               "overrides": ["agents.llama.chat_template=plain", "agents.gemma3.chat_template=plain",
                             "rollout.max_tokens=4", "reward.name=number", "prompts.file=short"]}  # fmt: skip
    rows, printed = run_command([models / "llama", models / "gemma3"], **options)
    assert [(r["agent"], r["method"], r["checkpoint"], r["samples"]) for r in rows] == [
        ("llama", "base", None, 2), ("gemma3", "base", None, 2)
    ]  # fmt: skip
    assert "not recorded" in printed
    one = [text for text in options["overrides"] if "gemma3" not in text]
    run_command([models / "llama"], out=tmp_path / "kept", **options | {"overrides": one})
    assert [r["agent"] for r in results(tmp_path / "kept")] == ["llama"]


def test_two_runs_side_by_side_keep_their_own_names(run, tmp_path, models, questions):
    other = make_run(tmp_path / "two", models, questions, names=("ada", "eve"), train="lora")
    rows, _ = run_command([run, other], benchmarks=["test"], modes=["single", "debate"], limit=2)
    shown = [(r["agent"], r["mode"]) for r in rows]
    assert shown[:4] == [("one.ada", "single"), ("bob", "single"), ("two.ada", "single"), ("eve", "single")]
    assert sorted(a for a, m in shown[4:]) == ["bob", "eve", "one.ada", "two.ada"]
    mine = [(r["agent"], r["mode"]) for r in results(other)]
    assert sorted(mine) == [("ada", "debate"), ("ada", "single"), ("eve", "debate"), ("eve", "single")]
    assert ("eve", "single") not in [(r["agent"], r["mode"]) for r in results(run)]
    assert all(r.get("against_single") for r in results(other) + rows if r["mode"] == "debate")


def test_what_training_on_a_gpu_filled_in_is_no_mistake_elsewhere(tmp_path):
    """Graphs, and keys and values of vLLM's, as `auto` and null settle them."""
    engine, task = EngineConfig(name="vllm", cache_gib=4.0), "task:largest"
    agents = {"ada": AgentConfig(model="HuggingFaceTB/SmolLM2-135M", engine=engine, graph_tokens=2048)}
    data = DataConfig(train=task, validation=task, test=task)
    made = Config(agents=agents, data=data, protocol="single", interaction="none")
    (tmp_path / "config.yaml").write_text(dump(made))
    elsewhere = ["agents.ada.device=cpu", "agents.ada.dtype=float32", "agents.ada.engine.name=embedded"]
    config = load_config(tmp_path / "config.yaml", [*evaluate_targets._of_training(tmp_path, elsewhere), *elsewhere])
    assert config.agents["ada"].graph_tokens == 0 and config.agents["ada"].engine.cache_gib is None
    kept = evaluate_targets._of_training(tmp_path, [])
    assert load_config(tmp_path / "config.yaml", kept).agents["ada"].engine.cache_gib == 4.0


def test_overrides_go_where_the_agent_is(run, models):
    first, second = read_targets([str(run), str(models / "llama")], [
        "agents.ada.dtype=float16", "agents.llama.chat_template=plain", "rollout.rounds=3"])  # fmt: skip
    assert first.config.agents["ada"].dtype == "float16" and second.config.agents["llama"].chat_template == "plain"
    assert first.config.rollout.rounds == second.config.rollout.rounds == 3
    assert {a.train for t in (first, second) for a in t.config.agents.values()} == {"none"}
    assert first.config.agents["ada"].model.endswith("checkpoints/step_000004/ada")


@pytest.mark.parametrize(
    "options, what",
    [
        ({"benchmarks": ["gsm9k"]}, "gsm8k"),
        ({"modes": ["idea"]}, "did you mean 'idea3'"),
        ({"samples": 0}, "0 answers"),
        ({"limit": 0}, "0 questions"),
        ({"benchmarks": []}, "nothing is named"),
        ({"benchmarks": ["test", "test"]}, "stands twice"),
        ({"overrides": ["agents.ada.dtyp=float16"]}, "did you mean 'dtype'"),
        ({"overrides": ["agents.zoe.dtype=float16"]}, "no model"),
    ],
)
def test_mistakes_in_what_is_asked(run, options, what):
    with pytest.raises(UserError) as error:
        run_command([run], **{"benchmarks": ["test"], **options})
    assert what in str(error.value)


def test_mistakes_in_who_is_asked(run, models, tmp_path):
    for targets, options, what in [
        ([tmp_path / "nobody"], {}, "nobody"),
        ([models / "llama"], {"overrides": ["agents.llama.chat_template=plain"]}, "no run is named"),
        ([models / "llama"], {"modes": ["debate"]}, "need peers"),
        ([run, run], {}, "stands twice"),
    ]:
        with pytest.raises(UserError, match=what):
            run_command(targets, **{"benchmarks": ["test"], **options})
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(UserError, match="no checkpoint yet"):
        run_command([young], benchmarks=["test"])


def test_a_peer_that_only_talks_keeps_its_model(tmp_path, run, models):
    target = read_targets([str(run)], ["agents.bob.train=none"])[0]
    assert target.config.agents["bob"].model == str(models / "gemma3")
