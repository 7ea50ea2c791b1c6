"""The plan of a run: monotonic, remedies that do what they say, `auto` for every card, the vetted configs as tables."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
from end_to_end import save_models, write_config
from ilr_benchmarks.shapes import write_shape
from plans import CONFIGS, PAIR, all_shapes, machine, opened

from ilr_fast.card import CardMemory, PeakSampler
from ilr_fast.cli import main
from ilr_fast.config_parse import load_config
from ilr_fast.errors import UserError
from ilr_fast.fill_in import (
    MICRO_BATCHES,
    MLP_COST,
    OFFLOAD_COST,
    RECOMPUTE_COST,
    SLEEPS,
    SPARE,
    fill_in,
    remedies,
    set_keys,
)  # fmt: skip
from ilr_fast.memory import GIB
from ilr_fast.plan import Machine, estimated_contexts, plan_run
from ilr_fast.plan_command import parse_size

CARDS = (24, 40, 48, 80, 141)


@pytest.fixture(scope="module")
def shapes():
    return all_shapes()


def everything_auto(config):
    agents = {
        name: replace(
            agent, micro_batch_tokens="auto", gradient_checkpointing="auto",
            optimizer=replace(agent.optimizer, offload="auto"),
        )
        for name, agent in config.agents.items()
    }  # fmt: skip
    return replace(config, agents=agents)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_vetted_config_fits_its_card_and_has_the_table_that_it_had(path, shapes):
    gib = {"24gb": 22, "80gb": 78}[path.parent.name]
    config, known = opened(path, shapes)
    settled = fill_in(config, known, machine(gib))
    planned = plan_run(settled, known, machine(gib))
    assert planned.fits
    table = {phase.name: round(phase.total / GIB, 1) for phase in planned.devices[0].phases}
    assert table == pytest.approx(GOLDEN[f"{path.parent.name}/{path.stem}"], abs=0.06)


@pytest.mark.parametrize("number", (1, 2, 3))
def test_the_papers_groups_fit_two_cards_of_80_gb_as_their_heads_say(number, shapes):
    path = CONFIGS[0].parents[1] / f"paper/group{number}.yaml"
    cards = Machine(dict.fromkeys(("cuda:0", "cuda:1"), parse_size("80GB")), None)
    config, known = opened(path, shapes)
    planned = plan_run(fill_in(config, known, cards), known, cards)
    assert planned.fits
    peak, host = planned.peak / GIB, planned.host.worst.total / GIB
    assert f"{peak:.1f} GiB at most on a card, {host:.0f} GiB of the host's memory" in path.read_text().splitlines()[1]


# GiB of each phase as planned for 22 and 78 GiB: they change where the arithmetic does, and then on purpose.
# fmt: off
GOLDEN: dict[str, dict[str, float]] = {
    "24gb/grpo_3b_full": {
        "load": 6.5, "generate": 12.6, "update qwen": 18.9, "checkpoint": 6.5
    },
    "24gb/grpo_8b_lora": {
        "load": 16.2, "generate": 20.0, "update llama": 20.7, "checkpoint": 16.8
    },
    "24gb/ilr_8b_7b_lora": {
        "load": 16.2, "generate llama": 20.7, "generate qwen": 19.9, "update llama": 19.1,
        "update qwen": 18.2, "checkpoint": 16.8
    },
    "24gb/ilr_8b_7b_lora_vllm": {
        "load": 17.4, "generate llama": 20.7, "generate qwen": 20.5, "update llama": 20.4,
        "update qwen": 19.5, "checkpoint": 18.0
    },
    "24gb/ilr_8b_7b_qlora": {
        "load": 12.1, "generate": 17.6, "update llama": 17.9, "update qwen": 17.2, "checkpoint": 13.4
    },
    "24gb/ilr_two_1.5b_full": {
        "load": 6.8, "generate": 19.1, "update qwen": 16.6, "update smollm2": 15.9, "checkpoint": 6.8
    },
    "80gb/grpo_3b_full": {
        "load": 19.0, "generate": 31.2, "update qwen": 72.0, "checkpoint": 30.5
    },
    "80gb/grpo_8b_lora": {
        "load": 32.8, "generate": 34.6, "update llama": 69.9, "checkpoint": 33.4
    },
    "80gb/ilr_8b_7b_lora": {
        "load": 32.1, "generate": 50.6, "update llama": 69.8, "update qwen": 68.8, "checkpoint": 33.3
    },
    "80gb/ilr_two_1.5b_full": {
        "load": 25.6, "generate": 38.4, "update qwen": 63.4, "update smollm2": 63.2, "checkpoint": 37.7
    },
}
# fmt: on


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_larger_cards_get_settings_that_are_no_slower(path, shapes):
    config, known = opened(path, shapes)
    config = everything_auto(config)
    before = None
    for gib in CARDS:
        settled = fill_in(config, known, machine(gib))
        planned = plan_run(settled, known, machine(gib))
        if planned.fits:
            assert planned.peak <= gib * GIB
            costs = [
                (agent.optimizer.offload == "host") * OFFLOAD_COST
                + {False: 0.0, "mlp": MLP_COST, True: RECOMPUTE_COST}[agent.gradient_checkpointing]
                + MICRO_BATCHES[agent.micro_batch_tokens] + SLEEPS[agent.engine.sleep]
                for agent in settled.agents.values()
            ]
            if before is not None:
                assert sum(costs) <= sum(before)
            before = costs
    assert before is not None, "nothing fits even 141 GiB"


def cost_of(settled):
    """What `auto` took, in the costs by which it chooses; micro-batches and sleep are the same for all agents."""
    agents = list(settled.agents.values())
    own = [
        (agent.optimizer.offload == "host") * OFFLOAD_COST
        + {False: 0.0, "mlp": MLP_COST, True: RECOMPUTE_COST}[agent.gradient_checkpointing]
        for agent in agents
    ]
    return sum(own) + MICRO_BATCHES[agents[0].micro_batch_tokens] + SLEEPS[agents[0].engine.rests]


def all_combinations(config, known):
    """Cost and peak of every way to fill in a config of `auto`."""
    names = list(config.agents)
    own = [(n, k, v) for n in names for k, v in (("optimizer.offload", ("none", "host")),
           ("gradient_checkpointing", (False, "mlp", True)))]  # fmt: skip
    for tokens, sleep in itertools.product(MICRO_BATCHES, SLEEPS if len(names) > 1 else ("never", "cache")):
        shared = [(n, k, v) for n in names for k, v in (("micro_batch_tokens", tokens), ("engine.sleep", sleep))]
        for values in itertools.product(*(choices for _, _, choices in own)):
            settings = [(n, k, v) for (n, k, _), v in zip(own, values, strict=True)]
            chosen = set_keys(config, [*shared, *settings])
            yield cost_of(chosen), plan_run(chosen, known, machine(22), estimated_contexts(config)).peak


@pytest.mark.parametrize("name", ["grpo_3b_full", "ilr_two_1.5b_full"])
def test_what_is_taken_costs_no_more_than_any_other_combination(name, shapes):
    config, known = opened(PAIR.parent / f"{name}.yaml", shapes)
    config = everything_auto(config)
    combinations = list(all_combinations(config, known))
    for gib in (11, 14, 18, 22, 30, 40):
        least = min((cost for cost, peak in combinations if peak <= (1 - SPARE) * gib * GIB), default=None)
        settled = fill_in(config, known, machine(gib))
        assert least is None or cost_of(settled) == pytest.approx(least, abs=0.011), gib


@pytest.mark.parametrize("gib", [22, 80])
def test_a_card_for_many_agents_is_filled_in_soon(gib, shapes):
    config, known = opened(PAIR, shapes)
    (one, agent), (_, other) = config.agents.items()
    agents = {f"{one}{n}": agent if n % 2 else other for n in range(8)}
    config = everything_auto(replace(config, agents=agents))
    known = {name: shapes[agent.model] for name, agent in agents.items()}
    begun = time.process_time()
    settled = fill_in(config, known, machine(gib))
    assert time.process_time() - begun < 30
    assert plan_run(settled, known, machine(gib)).fits


def test_memory_is_monotonic(shapes):
    config, known = opened(PAIR, shapes)
    settled = fill_in(config, known, machine(22))
    name = next(iter(settled.agents))

    def all_phases(*settings):
        planned = plan_run(set_keys(settled, settings), known, machine(22))
        return sum(phase.total for phase in planned.devices[0].phases)

    for key, rising in (
        ("engine.slots", (8, 64, 256)),
        ("graph_tokens", (0, 256, 4096)),
        ("engine.max_context", (2048, 4096, 8192)),
        ("micro_batch_tokens", (4096, 16384, 65536)),
        ("optimizer.rounding", ("stochastic", "copies")),
        ("gradient_checkpointing", (True, False)),
        ("optimizer.offload", ("host", "none")),
    ):
        totals = [all_phases((name, "optimizer.offload", "none"), (name, key, value)) for value in rising]
        assert totals == sorted(totals) and totals[0] < totals[-1], key


def test_remedies_do_what_they_say(shapes):
    config, known = opened(PAIR, shapes)
    settled = fill_in(config, known, machine(78))
    for gib in (10, 14, 18):
        found = remedies(settled, known, machine(gib))
        assert found
        for remedy in found:
            again = plan_run(set_keys(settled, remedy.settings), known, machine(gib))
            assert again.peak == remedy.plan.peak and again.fits == remedy.plan.fits
        assert any(remedy.plan.fits for remedy in found)
        for remedy in found:  # none of several is needless
            for setting in remedy.settings if remedy.plan.fits and len(remedy.settings) > 1 else ():
                rest = tuple(s for s in remedy.settings if s is not setting)
                assert not plan_run(set_keys(settled, rest), known, machine(gib)).fits, setting


def test_what_can_not_fit_has_no_remedy(shapes):
    config, known = opened(PAIR, shapes)
    settled = fill_in(config, known, machine(1))
    assert not any(remedy.plan.fits for remedy in remedies(settled, known, machine(1)))


@pytest.mark.parametrize(
    ("keys", "tokens"),
    [
        ("slots: 64, max_context: 8192", 64 * (2000 + 128)),  # all slots at the run's longest
        ("slots: 2, max_context: 8192", 8192),  # what vLLM asks for at the least
        ("slots: 100000, max_context: 8192", None),  # a quarter of the card
        ("slots: 64, max_context: 8192, cache_gib: 3", 3 * GIB / (28 * 2 * 2 * 128 * 2)),
    ],
)
def test_vllm_takes_the_keys_and_values_that_are_planned(shapes, keys, tokens):
    config, known = opened(PAIR, shapes, f"agents.qwen.engine={{name: vllm, {keys}}}")
    contexts = dict.fromkeys(config.agents, 2000)
    settled = fill_in(config, known, machine(22), contexts)
    size = 22 * GIB / 4 if tokens is None else tokens * 28 * 2 * 2 * 128 * 2  # layers, keys and values, heads, bf16
    assert settled.agents["qwen"].engine.cache_gib == pytest.approx(size / GIB, abs=0.001)
    (phase,) = (p for p in plan_run(settled, known, machine(22), contexts).devices[0].phases if p.name == "generate")
    (part,) = (p.size for p in phase.parts if p.agent == "qwen" and p.item == "keys and values")
    assert part == pytest.approx(size, abs=0.001 * GIB)


def test_dialogues_ahead_stand_beside_all_updates(shapes):
    engines = [f"agents.{n}.engine={{name: vllm, weights: copy, slots: 8, cache_gib: 2}}" for n in ("qwen", "smollm2")]
    config, known = opened(PAIR, shapes, *engines, "loss.importance=token", "rollout.ahead=true")
    settled = fill_in(everything_auto(config), known, machine(78))
    assert all(agent.engine.sleep == "never" for agent in settled.agents.values()), "none rests while others learn"
    phases = {phase.name: phase for phase in plan_run(settled, known, machine(78)).devices[0].phases}
    update = phases["update " + " + ".join(settled.agents)]
    assert set(phases["generate"].parts) < set(update.parts)
    assert {part.agent for part in update.parts if part.item == "gradients"} == set(settled.agents)


def test_processes_have_contexts_and_updates_of_their_own(shapes):
    config, known = opened(PAIR, shapes)
    settled = fill_in(config, known, machine(78))
    names = list(settled.agents)
    together = plan_run(settled, known, machine(78)).devices[0]
    apart = plan_run(set_keys(settled, [(n, "host", "process") for n in names]), known, machine(78)).devices[0]
    assert [p.name for p in together.phases] == ["load", "generate", *(f"update {n}" for n in names), "checkpoint"]
    assert [p.name for p in apart.phases] == ["load", "generate", f"update {' + '.join(names)}", "checkpoint"]
    assert apart.worst.total > together.worst.total
    contexts = [sum(p.size for p in d.phases[0].parts if not p.agent) for d in (together, apart)]
    assert contexts[1] == len(names) * contexts[0]


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("24", 24 * GIB), ("80 GB", 80 * 10**9), ("22.5gib", int(22.5 * GIB))]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24 apples", "-3GiB", "0"])
def test_no_sizes(text):
    with pytest.raises(UserError, match="--gpu-memory"):
        parse_size(text)


@pytest.mark.parametrize(("gib", "status"), [("22GiB", 0), ("9GiB", 2)])
def test_the_command(tmp_path, capfd, gib, status):
    overrides = []
    for name, agent in load_config(PAIR).agents.items():
        overrides.append(f"agents.{name}.model={write_shape(agent.model, tmp_path)}")
    assert main(["plan", str(PAIR), "--gpu-memory", gib, *overrides]) == status
    out, err = capfd.readouterr()
    assert all(word in out for word in ("load", "generate", "update", "AdamW's", "together", "auto:"))
    if status:
        assert "does not fit" in out and "ilr-fast: " in err and "it fits with agents." in err
        fitting = err.split("it fits with ")[1].split(" (")[0].split()
        assert main(["plan", str(PAIR), "--gpu-memory", gib, *overrides, *fitting]) == 0


@pytest.mark.parametrize(
    ("key", "said"), [("agents.qwen.device=cuda:3", "no device cuda:3"), ("reward.name=maths", "math"),
                      ("agents.qwen.device=gpu", "no device gpu"), ("data.test=task:sum", "'sums'"),
                      ("data={train: 'task:sums', validation: 'task:sums', test: 'task:sums', task_options: {lowr: 3}}",
                       "did you mean 'low'")]
)  # fmt: skip
def test_the_command_refuses_what_training_would(key, said, monkeypatch, capfd):
    monkeypatch.setattr("ilr_fast.plan_command.machine_at_hand", lambda: machine(22))
    assert main(["plan", str(PAIR), key]) == 2
    assert said in capfd.readouterr().err


def test_the_command_refuses_an_exact_engine_for_a_family_that_has_none(tmp_path, capfd):
    bob = save_models(tmp_path) / "bob"
    keys = [f"agents.qwen.model={bob}", f"agents.smollm2.model={bob}", "agents.qwen.engine={name: vllm, exact: true}"]
    assert main(["plan", str(PAIR), "--gpu-memory", "24GiB", *keys]) == 2
    assert "no exact forward pass for Gemma3ForCausalLM" in capfd.readouterr().err


@pytest.mark.parametrize("command", [["plan"], ["train"]])
@pytest.mark.parametrize(
    ("engine", "said", "more"),
    [
        ("max_context: 5000", "5000 tokens, where the model has 4096 positions", []),
        ("max_context: 1024, cache_gib: 0.0001", "one request of 1024 tokens takes", []),
        ("exact: true", "ada.engine.exact: no exact engine on the CPU", []),
        ("weights: copy, quantization: fp8", "ada.engine.quantization: 8-bit weights need a GPU", []),
        ("weights: share", "ada.lora.rank: an adapter of rank 600", ["agents.ada.lora.rank=600"]),
    ],
)
def test_what_vllm_would_refuse_is_said_before_anything_is_made(
    tmp_path, monkeypatch, capfd, command, engine, said, more
):
    monkeypatch.setattr("ilr_fast.engines.vllm_core.check_version", lambda *_, **__: None)
    monkeypatch.setattr("ilr_fast.plan_command.machine_at_hand", lambda: Machine({}, 24 * GIB))
    config = str(write_config(tmp_path, save_models(tmp_path / "models")))
    more = [*more, "agents.ada.train=lora"] if more else []
    assert main([*command, config, f"agents.ada.engine={{name: vllm, {engine}}}", *more]) == 2
    assert said in capfd.readouterr().err and not (tmp_path / "run").exists()


def test_training_refuses_what_does_not_fit_before_anything_is_loaded(tmp_path, monkeypatch, capfd):
    models = save_models(tmp_path / "models")
    monkeypatch.setattr("ilr_fast.hosts.local.open_host", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("ilr_fast.plan_command.host_memory", lambda: 2**28)
    assert main(["train", str(write_config(tmp_path, models))]) == 2
    assert "does not fit" in capfd.readouterr().err and not (tmp_path / "run").exists()


def test_the_sampler_takes_the_peak_beyond_what_others_held():
    used = iter([5 * GIB, 6 * GIB, 9 * GIB, 6 * GIB])
    sampler = PeakSampler(lambda: [CardMemory(24 * GIB, next(used))], interval=1e9)
    with sampler:
        sampler._sample()
        sampler._sample()
        assert sampler.take() == 4 * GIB
        assert sampler.take() == 1 * GIB  # by a look of its own: nobody has looked since
    assert PeakSampler(lambda: []).take() is None
