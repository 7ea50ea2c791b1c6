"""Every mistake in a config names what, where and the remedy; what is right comes through whole."""

from pathlib import Path

import pytest

from ilr_fast.config import Config, calibration_is_noop, turn_limit
from ilr_fast.config_parse import dump, load_config, walk
from ilr_fast.docs_config import reference
from ilr_fast.errors import UserError

ROOT = Path(__file__).parents[1]
GOOD = """
agents:
  gemma: {model: gemma-3-270m, optimizer: {lr: 4e-6}}
  smollm2-1.7b: {model: smollm2}
data: {train: "task:largest", validation: "task:largest", test: "task:largest"}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return path

    return write


def refused(path: Path, overrides=()) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return caught.value


def test_good_config_with_defaults_and_floats_without_a_point(write):
    config = load_config(write(GOOD))
    assert list(config.agents) == ["gemma", "smollm2-1.7b"]
    assert config.agents["gemma"].optimizer.lr == 4e-6 and config.agents["smollm2-1.7b"].optimizer.lr == 1e-6
    assert config.rollout.samples == 8 and turn_limit(config.rollout, "fusion") == 512


@pytest.mark.parametrize(
    "text, where, remedy",
    [
        ("stepz: 3", "my.yaml: stepz", "'steps'"),
        ("rollout: {sampels: 3}", "my.yaml: rollout.sampels", "'samples'"),
        ("agents: {a: {model: m, optimiser: {lr: 1}}}", "my.yaml: agents.a.optimiser", "'optimizer'"),
        ("agents: {a: {model: m, optimizer: {lrr: 1}}}", "my.yaml: agents.a.optimizer.lrr", "'lr'"),
        ("zzzzz: 3", "my.yaml: zzzzz", "known: "),
        ("7: 3", "my.yaml: 7", "known: "),
    ],
)
def test_unknown_key_names_the_nearest(write, text, where, remedy):
    error = refused(write(text))
    assert "unknown key" in error.what and error.where.endswith(where) and remedy in error.remedy


@pytest.mark.parametrize(
    "text, where, what",
    [
        ("steps: many", "steps", "a whole number, got 'many'"),
        ("steps: 2.5", "steps", "a whole number, got 2.5"),
        ("steps: true", "steps", "a whole number, got True"),
        ("steps:", "steps", "a whole number, got None"),
        ("loss: {clip_low: big}", "loss.clip_low", "a number, got 'big'"),
        ("loss: {clip_low: true}", "loss.clip_low", "a number, got True"),
        ("deterministic: 1", "deterministic", "true or false, got 1"),
        ("run: 5", "run", "a text, got 5"),
        ("rollout: 5", "rollout", "expected keys below it, got 5"),
        ("rollout: {stop: 5}", "rollout.stop", "a list, got 5"),
        ("rollout: {stop: [a, 5]}", "rollout.stop[1]", "a text, got 5"),
        ("rollout: {max_tokens: {default: x}}", "rollout.max_tokens.default", "a whole number, got 'x'"),
        ("agents: [a, b]", "agents", "expected names with values"),
        ("agents: {a: model}", "agents.a", "expected keys below it"),
        ("interaction: dynamical", "interaction", "'dynamical' is not one of its values"),
        ("interaction: [dynamic]", "interaction", "is not one of its values"),
    ],
)
def test_wrong_type_names_key_and_kind(write, text, where, what):
    error = refused(write(text))
    assert error.where.endswith(f"my.yaml: {where}") and what in error.what


@pytest.mark.parametrize(
    "text, where, remedy",
    [
        ("steps: 0", "steps", "at least 1"),
        ("cooperation_ratio: 1.5", "cooperation_ratio", "0 to 1"),
        ("cooperation_ratio: -0.1", "cooperation_ratio", "0 to 1"),
        ("cooperation_ratio: .nan", "cooperation_ratio", "give a number"),
        ("loss: {entropy_coef: .nan}", "loss.entropy_coef", "give a number"),
        ("agents: {a: {optimizer: {lr: .inf}}}", "agents.a.optimizer.lr", "give a number"),
        ("loss: {clip_low: 2}", "loss.clip_low", "0 to 1"),
        ("rollout: {temperature: 0}", "rollout.temperature", "at least 0.01"),
        ("checkpoint: {keep: 0}", "checkpoint.keep", "at least 1"),
    ],
)
def test_out_of_range_names_the_range(write, text, where, remedy):
    error = refused(write(text))
    assert error.where.endswith(f"my.yaml: {where}") and remedy in error.remedy


@pytest.mark.parametrize(
    "overrides, where, what",
    [
        (["rollout.top_p=0.9"], "rollout.top_p", "top-p while training"),
        (["top_k=5"], "rollout.top_k", "top-k while training"),
        (["rollout.samples=1"], "rollout.samples", "a group of one"),
        (["agents.gemma.engine.name=vllm", "agents.gemma.device=cuda:1"], "agents.gemma.device", "the first device"),
        (["agents.gemma.engine.exact=true"], "agents.gemma.engine.exact", "a setting of vLLM's"),
        (["agents.gemma.engine={name: vllm, exact: true, weights: copy}"], "agents.gemma.engine.weights", "on a copy"),
        (["agents.gemma.engine={name: vllm, exact: true}", "agents.gemma.train=lora"],
         "agents.gemma.train", "with adapters"),
        (["agents.gemma.engine={name: vllm, exact: true}", "agents.gemma.fused_layers=off"],
         "agents.gemma.fused_layers", "without fused layers"),
        (["agents.gemma.engine={name: vllm, exact: true}", "agents.gemma.dtype=float32"],
         "agents.gemma.dtype", "in float32"),
        (["agents.gemma.engine={name: vllm, exact: true}", "agents.smollm2-1.7b.engine.name=vllm"],
         "agents", "the whole process's"),
        (["agents.gemma.engine={name: vllm, dtype: bfloat16}"], "agents.gemma.engine.weights", "of another precision"),
        (["agents.gemma.engine={name: vllm, quantization: fp8}"], "agents.gemma.engine.weights", "another precision"),
        (["agents.gemma.engine={name: vllm, dtype: bfloat16, weights: auto}"],  # planned without a copy
         "agents.gemma.engine.weights", "another precision"),
        (["agents.gemma.engine={name: vllm, quantization: fp8, weights: copy}", "agents.gemma.train=lora"],
         "agents.gemma.engine.quantization", "adapters"),
        (["agents.gemma.engine.dtype=bfloat16"], "agents.gemma.engine.dtype", "a setting of vLLM's"),
        (["agents.gemma.engine.cache_gib=2"], "agents.gemma.engine.cache_gib", "a setting of vLLM's"),
        (["rollout.refill=4", "loss.beta=0.1"], "rollout.refill", "by the KL"),
        (["rollout.stop_after_equal=2", "loss.entropy_coef=0.1"], "rollout.stop_after_equal", "by the entropy bonus"),
        (["rollout.stop_after_equal=8", "rollout.samples=8"], "rollout.stop_after_equal", "nothing to cut off"),
        (["rollout.stop_after_equal=2", "credit.calibrate=advantage"], "rollout.stop_after_equal", "by their peers"),
        (["agents.gemma.optimizer.rounding=stochastic", "agents.gemma.dtype=float16"],
         "agents.gemma.optimizer.rounding", "float16 weights"),
        (["agents.gemma.optimizer.moments=bfloat16"], "agents.gemma.optimizer.moments", "keeps float32 moments"),
        (["loss.dual_clip=1.1"], "loss.dual_clip", "clip bounds crossed"),
        (["loss.clip_high=3", "dual_clip=4"], "loss.dual_clip", "clip bounds crossed"),
        (["dual_clip=3", "objective=cispo"], "loss.dual_clip", "ppo"),
        (["loss.minibatches=33"], "loss.minibatches", "more minibatches"),
        (["agents.gemma.model="], "agents.gemma.model", "no model"),
        (["agents.gemma.train=none", "agents.smollm2-1.7b.train=none"], "agents", "no agent is trained"),
        (["data.test="], "data.test", "no questions"),
        (["agents={a: {model: m}}"], "protocol", "needs peers"),
        (["agents={a: {model: m}}", "protocol=single", "interaction=competition"], "interaction", "single agent"),
        (["agents={a: {model: m}}", "protocol=single", "modes=[debate]"], "evaluate.modes", "needs peers"),
        (["evaluate.modes=[single, chat]"], "evaluate.modes", "unknown mode 'chat'"),
        (["few_shot=[0]"], "evaluate.few_shot", "no examples"),
        (["rollout.max_tokens={sharing: 3}"], "rollout.max_tokens", "no limit"),
        (["rollout.max_tokens=0"], "rollout.max_tokens", "no tokens"),
        (["agents.gemma.engine.max_context=256"], "agents.gemma.engine.max_context", "does not fit"),
        (["agents.gemma.optimizer.beta2=1"], "agents.gemma.optimizer", "never move"),
    ],
)
def test_contradictions(write, overrides, where, what):
    # An empty text counts as not given; written as an override it must be quoted.
    overrides = [f"{o}''" if o.endswith("=") else o for o in overrides]
    error = refused(write(GOOD), overrides)
    assert where in error.where and what in error.what and error.remedy


@pytest.mark.parametrize(
    "overrides, what",
    [
        (["train=lora"], "with `train: lora`"),
        (["device=cpu"], "on the CPU"),
        (["dtype=float32"], "in float32"),
        (["fused_layers=off"], "without fused layers"),
        (["gradient_checkpointing=true"], "computed again"),
        (["engine={name: vllm, exact: true}"], "exact engine"),
        (["engine.sleep=turns"], "leave the GPU"),
        (["engine={name: vllm, weights: copy}", "rollout.ahead=true", "loss.importance=token"], "another thread"),
    ],
)
def test_graphs_of_layers_that_there_are_none_of(write, overrides, what):
    overrides = [o if o.startswith(("rollout", "loss")) else f"agents.gemma.{o}" for o in overrides]
    error = refused(write(GOOD), [*overrides, "agents.gemma.graph_tokens=4096"])
    assert error.where.endswith("agents.gemma.graph_tokens") and what in error.what


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../../etc", "", "-x", "a.state", "state.json", "gém"])
def test_agent_names_are_folder_names(write, name):
    tree = GOOD.replace("gemma:", f'"{name}":')
    assert f"agents.{name}" in refused(write(tree)).where


def test_an_agent_takes_over_the_keys_of_another(write):
    agents = "agents: {a: &a {model: m, train: lora}, b: {<<: *a, model: n}}"
    config = load_config(write(f"{agents}\ndata: {{train: t, validation: v, test: s}}"))
    a, b = config.agents.values()
    assert (a.model, b.model) == ("m", "n") and a.train == b.train == "lora"


def test_duplicate_agents_and_keys(write):
    error = refused(write("agents:\n  a: {model: m}\n  a: {model: n}\n"))
    assert "'a' stands there twice" in error.what and "line 3" in error.where and "its own name" in error.remedy
    assert "line 2" in refused(write("steps: 3\nsteps: 4\n")).where
    assert "twice" in refused(write('agents: {1: {model: m}, "1": {model: n}}')).what


@pytest.mark.parametrize(
    "text, what",
    [
        ("agents: {a: [", "not YAML"),
        ("- steps", "not a mapping"),
        ("false", "not a mapping"),
        ("steps", "not a mapping"),
        ("? [a, b]\n: 3", "can't be a key"),
        ("run: 2024-02-31", "not YAML"),
        ("a: &x {b: *x}", "not YAML"),
        ("run: \x01", "not YAML"),
        ("", "no agents"),
        ("agents:", "no agents"),
    ],
)
def test_files_that_are_no_config(write, text, what):
    error = refused(write(text))
    assert what in error.what and "my.yaml" in error.where


def test_files_that_cannot_be_read(tmp_path):
    assert "No such file" in refused(tmp_path / "none.yaml").what
    assert "directory" in refused(tmp_path).what
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused(tmp_path / "binary").what


def test_an_override_leaves_an_alias_what_it_was(write):
    text = """
agents: {a: {model: m, engine: &e {slots: 4, max_context: 8192}}, b: {model: n, engine: *e}}
data: {train: t, validation: t, test: t}
"""
    agents = load_config(write(text), ["agents.b.engine.slots=9"]).agents
    assert [agents[name].engine.slots for name in "ab"] == [4, 9]
    assert [agents[name].engine.max_context for name in "ab"] == [8192, 8192]


def test_overrides(write):
    path = write(GOOD)
    config = load_config(path, ["steps=20", "beta=0.1", "agents.smollm2-1.7b.optimizer.lr=1e-5", "kl=k3", "rounds=3",
                                "rollout.max_tokens=8", "rollout.max_tokens.sharing=20", "data.task_options.numbers=3",
                                "interaction=off", "agents.c.model=m"])
    assert (config.steps, config.loss.beta, config.loss.kl, config.rollout.rounds) == (20, 0.1, "k3", 3)
    assert config.agents["smollm2-1.7b"].optimizer.lr == 1e-5 and config.agents["c"].model == "m"
    assert config.rollout.max_tokens == {"default": 8, "sharing": 20}
    assert config.data.task_options == {"numbers": 3} and config.interaction == "none"
    single = load_config(write("agents:\n  a: {model: m}\nprotocol: single\ndata: {train: t, validation: t, test: t}"),
                         ["lr=1e-4", "optimizer.beta1=0.8"])
    assert single.agents["a"].optimizer.lr == 1e-4 and single.agents["a"].optimizer.beta1 == 0.8


@pytest.mark.parametrize(
    "override, what, remedy",
    [
        ("steps", "not key=value", "steps=20"),
        ("=3", "not key=value", "steps=20"),
        ("stepz=3", "unknown key 'stepz'", "'steps'"),
        ("loss.betta=3", "unknown key 'loss.betta'", "'beta'"),
        ("agents.gemma.optimizer.lrr=3", "unknown key 'agents.gemma.optimizer.lrr'", "'lr'"),
        ("samples=3", "several keys", "rollout.samples, difficulty.samples, evaluate.samples"),
        ("lr=3", "several keys", "agents.gemma.optimizer.lr, agents.smollm2-1.7b.optimizer.lr"),
        ("steps.x=3", "has no keys below it", "path"),
        ("steps=[", "not YAML", "quote"),
        ("steps=x", "a whole number", "whole number"),
        ("loss.clip_low=7", "out of range", "0 to 1"),
        ("interaction=dynamik", "not one of its values", "'dynamic'"),
    ],
)
def test_mistaken_override_names_the_argument(write, override, what, remedy):
    error = refused(write(GOOD), [override])
    assert override in error.where and "argument" in error.where and what in error.what and remedy in error.remedy


def test_dump_gives_the_same_config_back(write, tmp_path):
    config = load_config(write(GOOD), ["rollout.stop=['1e5', 'no', '12:30']", "beta=1e-7"])
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load_config(again) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_are_right(path):
    assert load_config(path).agents


def test_every_key_is_documented_and_the_page_is_current():
    for path, field, _ in walk(Config):
        assert field.metadata["doc"].endswith("."), path
    assert (ROOT / "docs" / "config.md").read_text() == reference(), "run `make docs`"


def test_calibration_is_noop_only_on_rewards_of_two_values(write):
    path = write(GOOD)
    assert not calibration_is_noop(load_config(path))
    assert calibration_is_noop(load_config(path, ["format_weight=0"]))
    assert calibration_is_noop(load_config(path, ["format_weight=0", "kl=k1"]))  # beta is 0
    for mended in (["calibrate=advantage"], ["advantage=dr_grpo"], ["overlong_buffer=4"], ["kl=k1", "loss.beta=0.1"],
                   ["reward.name=task"]):  # fmt: skip
        assert not calibration_is_noop(load_config(path, ["format_weight=0", *mended]))


def test_a_mistyped_section_gets_the_nearest_whole_path(write):
    with pytest.raises(UserError, match="did you mean 'reward.name'"):
        load_config(write(GOOD), ["rewrd.name=number"])
    with pytest.raises(UserError, match="docs/config.md lists all keys"):
        load_config(write(GOOD), ["qqqqqq=number"])
