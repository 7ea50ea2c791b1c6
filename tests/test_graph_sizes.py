"""`graph_tokens`: what `auto` takes, what the plan counts, and who has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plans import PAIR, all_shapes, machine, opened

from ilr_fast.config_parse import load_config
from ilr_fast.fill_in import fill_in
from ilr_fast.graph_sizes import held
from ilr_fast.plan import plan_run

SUMS = Path(__file__).parents[1] / "configs" / "gpu" / "sums.yaml"
MANY = ("agents.smollm2.micro_batch_tokens=16384",)


@pytest.fixture(scope="module")
def shapes():
    return all_shapes()


@pytest.mark.parametrize(
    "gib, overrides, tokens",
    [
        (80, MANY, 2048),
        (16, MANY, 2048),
        (8, MANY, 0),
        (80, ("agents.smollm2.micro_batch_tokens=1000",), 1024),
        (80, ("deterministic=true",), 0),
        (80, ("agents.smollm2.train=lora",), 0),
        (80, ("agents.smollm2.dtype=float32",), 0),
        (80, ("agents.smollm2.gradient_checkpointing=true",), 0),
        (80, ("agents.smollm2.engine.exact=true",), 0),
        (80, ("agents.smollm2.engine.name=embedded", "agents.smollm2.engine.cache_gib=null",
              "agents.smollm2.device=cpu"), 0),
        (80, ("agents.smollm2.graph_tokens=512",), 512),
    ],
)  # fmt: skip
def test_graphs_of_the_layers_take_what_memory_is_left(gib, overrides, tokens, shapes):
    """SmolLM2-135M; what is `auto` otherwise is as it was."""
    config = load_config(SUMS, overrides)
    known = {"smollm2": shapes["HuggingFaceTB/SmolLM2-135M-Instruct"]}
    settled = fill_in(config, known, machine(gib))
    assert settled.agents["smollm2"].graph_tokens == tokens
    assert plan_run(settled, known, machine(gib)).fits


def test_the_plan_counts_the_size_that_is_captured(shapes):
    shape = shapes["HuggingFaceTB/SmolLM2-135M-Instruct"]
    asked, captured = (load_config(SUMS, [f"agents.smollm2.graph_tokens={n}"]).agents["smollm2"] for n in (1030, 2048))
    assert held(asked, shape, 2) == held(captured, shape, 2) > 0


def test_graphs_that_were_asked_for_stay_and_what_refuses_them_is_not_taken(shapes):
    """Two agents on a card that is too small to keep what has graphs."""
    config, known = opened(PAIR, shapes)
    agents = {
        name: replace(agent, train="full", graph_tokens=2048, gradient_checkpointing="auto",
                      engine=replace(agent.engine, sleep="auto"))
        for name, agent in config.agents.items()
    }  # fmt: skip
    for agent in fill_in(replace(config, agents=agents), known, machine(8)).agents.values():
        assert agent.gradient_checkpointing is not True and agent.engine.sleep != "turns"


def test_models_whose_layers_take_long_and_other_families_have_no_graphs(shapes):
    config, small = load_config(SUMS), shapes["HuggingFaceTB/SmolLM2-135M-Instruct"]
    for shape in (shapes["meta-llama/Llama-3.2-1B-Instruct"], replace(small, architecture="Gemma3ForCausalLM")):
        settled = fill_in(config, {"smollm2": shape}, machine(80))
        assert settled.agents["smollm2"].graph_tokens == 0
