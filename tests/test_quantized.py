"""QLoRA on the CPU: four bits under adapters, by the same code as on a GPU."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from end_to_end import agent, save_models, write_config
from learners import make_agent, rollout, save_model, weights
from test_memory import agent as agent_config
from test_memory import bytes_of, memory_of
from vllm_models import small_model

from ilr_fast.cli import main
from ilr_fast.config import LossConfig
from ilr_fast.config_parse import load_config
from ilr_fast.engines.embedded import EmbeddedEngine
from ilr_fast.errors import UserError
from ilr_fast.loading import load_policy
from ilr_fast.model_shape import shape_of
from ilr_fast.quantized import quantize_
from ilr_fast.types import Sampling

bitsandbytes = pytest.importorskip("bitsandbytes")
QLORA = {"train": "lora", "quantize": "nf4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models"), "llama")


def packed(model):
    return [m.weight.detach().clone() for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]


def test_the_linear_layers_take_what_the_plan_says():
    model = small_model("llama", hidden_size=256, intermediate_size=512)
    shape = shape_of(model.config)
    quantize_(model.bfloat16(), torch.bfloat16, "agents.ada")
    model.to("cpu")
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == len(shape.linears) and type(model.lm_head) is torch.nn.Linear
    states = [m.weight.quant_state for m in layers]
    scales = bytes_of(t for s in states for t in (s.absmax, s.state2.absmax))
    rest = bytes_of(p for p in model.parameters() if p.dtype != torch.uint8)
    taken = bytes_of(m.weight for m in layers) + scales + rest
    planned = memory_of(agent_config(dtype="bfloat16", train="none", quantize="nf4"), shape).weights
    assert planned == pytest.approx(taken, rel=2e-3)


def test_adapters_learn_over_four_bits_that_stay(folder):
    trainer, plain = make_agent(folder, **QLORA), make_agent(folder, train="lora")
    before = packed(trainer.model)
    assert before and all(w.dtype == torch.uint8 for w in before)
    losses = {}
    for name, made in (("nf4", trainer), ("plain", plain)):
        results = [made.update(rollout(dead=False), step) for step in (1, 2, 3)]
        assert all(r.skipped is None for r in results)
        losses[name] = results[0].metrics["logp_diff_mean"]
    assert losses["nf4"] == pytest.approx(losses["plain"], rel=0.2)
    assert all(torch.equal(a, b) for a, b in zip(before, packed(trainer.model), strict=True))
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert moved and all(p.abs().max() > 0 for p in moved)


def test_the_reference_is_the_model_without_adapters(folder):
    trainer = make_agent(folder, LossConfig(beta=0.1), **QLORA)
    first = trainer.reference_logps(rollout())
    trainer.update(rollout(), 1)
    assert trainer.reference_logps(rollout()) == first


def test_the_engine_samples_with_the_trainers_log_probs(folder):
    trainer = make_agent(folder, **QLORA)
    trainer.update(rollout(), 1)
    engine = EmbeddedEngine(trainer.model, trainer.tokenizer, slots=2)
    prompt = [3, 5, 7, 11]
    found = asyncio.run(engine.generate(prompt, Sampling(5, seed=1)))
    with torch.no_grad():
        logits = trainer.model(torch.tensor([[*prompt, *found.tokens]])).logits[0]
    logps = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
    assert found.logps == pytest.approx(logps.tolist(), abs=1e-4)


def test_a_resumed_agent_has_the_same_bits(folder, tmp_path):
    trainer = make_agent(folder, **QLORA)
    trainer.update(rollout(), 1)
    trainer.save_model(tmp_path / "model")
    trainer.save_state(tmp_path / "state")
    again = make_agent(folder, **QLORA)
    again.load(tmp_path / "model", tmp_path / "state")
    for made in (trainer, again):
        made.update(rollout(seed=1), 2)
    assert torch.equal(weights(trainer), weights(again))


def test_a_run_merges_into_16_bits_or_more(tmp_path):
    models = save_models(tmp_path / "models")
    agents = {name: agent(models, name, **QLORA, lora={"rank": 4}) for name in ("ada", "bob")}
    config = write_config(tmp_path, models, agents=agents, steps=1, log__tensorboard=False)
    assert main(["train", str(config), "--merge", "--debug"]) == 0
    import transformers

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged" / "ada")
    assert all(p.is_floating_point() for p in merged.parameters())


@pytest.mark.parametrize(
    ("keys", "match"), [({"quantize": "nf4"}, "four bits can't be trained"),
                        ({**QLORA, "engine": {"name": "vllm"}}, "vLLM is not given weights of four bits")]
)  # fmt: skip
def test_what_does_not_go_together(tmp_path, keys, match):
    models = tmp_path
    agents = {name: agent(models, name, **keys) for name in ("ada", "bob")}
    with pytest.raises(UserError, match=match):
        load_config(write_config(tmp_path, models, agents=agents))


def test_no_layer_but_the_one_that_is_drawn_is_held_in_16_bits():
    model, alive = small_model("llama"), []

    def draw(module):
        gc.collect()
        assert not [name for name, weight in alive if weight() is not None]
        module.weight = torch.nn.Parameter(torch.randn(module.weight.shape))
        alive.append((str(module), weakref.ref(module.weight)))
        return torch.device("cpu")

    quantize_(model, torch.float32, "agents.ada", draw)
    assert len(alive) == len(shape_of(model.config).linears)


def test_random_weights_are_drawn_layer_by_layer(folder):
    config = agent_config(model=str(folder), random_weights=True, device="cpu", dtype="float32", **QLORA)
    made = load_policy(config, "agents.ada", 1)
    plain = load_policy(replace(config, quantize="none"), "agents.ada", 1)
    assert not any(t.is_meta for t in (*made.parameters(), *made.buffers()))
    buffers = dict(plain.named_buffers())
    for name, buffer in made.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], msg=name)
    for name, drawn in plain.named_parameters():
        found = made.get_parameter(name)
        if found.dtype != torch.uint8 and "lora" not in name:
            assert found.shape == drawn.shape, name
            assert float(found.std()) == pytest.approx(float(drawn.std()), rel=0.1, abs=1e-6), name
    again = load_policy(config, "agents.ada", 1)
    assert all(torch.equal(a, b) for a, b in zip(packed(made), packed(again), strict=True))
