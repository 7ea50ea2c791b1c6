"""What an agent takes, by arithmetic, against real small models: to the byte where it is weights, states and caches."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from learners import make_agent, rollout, save_model
from vllm_models import FAMILIES, small_model

from ilr_fast.activations import activations
from ilr_fast.attention import packed_forward
from ilr_fast.config import AgentConfig, Config, EngineConfig, LoraConfig, LossConfig, OptimizerConfig
from ilr_fast.engines.cache import CachePlan, SlotCache
from ilr_fast.engines.embedded import EmbeddedEngine
from ilr_fast.engines.slots import Piece
from ilr_fast.engines.step_size import GRAPH_REQUESTS, GRAPH_TOKENS, VLLM_TOKENS, logit_rows, prompt_tokens, vllm_tokens
from ilr_fast.memory import Use, agent_memory, weight_size
from ilr_fast.model_shape import model_shape, shape_of

USE = Use("cpu", 64)
SETTLED = dict(model="x", micro_batch_tokens=256, gradient_checkpointing=False)


def agent(**changes):
    optimizer = OptimizerConfig(**{"offload": "none", **changes.pop("optimizer", {})})
    return AgentConfig(**{**SETTLED, "optimizer": optimizer, **changes})


def memory_of(config, shape, use=USE, loss=None):
    return agent_memory(config, Config(agents={"ada": config}, loss=loss or LossConfig()), shape, use)


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_to_the_byte(family, tied):
    model = small_model(family, tied=tied)
    shape = shape_of(model.config)
    assert shape.count() == sum(p.numel() for p in model.parameters())
    assert shape.tied == (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for dtype in ("float32", "bfloat16"):
        weights = bytes_of(model.to(getattr(torch, dtype)).parameters())
        assert memory_of(agent(dtype=dtype, train="none"), shape).weights == weights
    assert memory_of(agent(dtype="float32"), shape, loss=LossConfig(beta=0.1)).weights == 2 * 2 * weights


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_adapters_to_the_byte(family, targets):
    import peft

    model = small_model(family)
    shape = shape_of(model.config)
    names = targets if targets == "all-linear" else targets.split(",")
    whole = bytes_of(model.parameters())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=5, target_modules=names, task_type="CAUSAL_LM"))
    config = agent(dtype="float32", train="lora", lora=LoraConfig(rank=5, targets=targets))
    adapters = bytes_of(p for p in adapted.parameters() if p.requires_grad)
    memory = memory_of(config, shape)
    assert memory.weights == whole + adapters and memory.moments == 2 * adapters and memory.gradients == adapters


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize(
    ("dtype", "rounding", "moments"),
    [("float32", "copies", "float32"), ("bfloat16", "copies", "float32"), ("bfloat16", "stochastic", "bfloat16")],
)
def test_states_and_gradients_to_the_byte(tmp_path, family, dtype, rounding, moments):
    folder = save_model(tmp_path, family)
    optimizer = OptimizerConfig(rounding=rounding, moments=moments, offload="none")
    trainer = make_agent(folder, dtype=dtype, optimizer=optimizer)
    taken = []
    step = trainer.optimizer.step

    def watched(*arguments, **keys):
        sinks = keys["sinks"]
        rest = [p.grad for p in trainer.model.parameters() if p.requires_grad and p not in sinks]
        taken.append(bytes_of([*sinks.values(), *rest]))
        return step(*arguments, **keys)

    trainer.optimizer.step = watched
    trainer.update(rollout(), 1)
    kept = trainer.optimizer.state()
    if rounding == "stochastic":
        copies, states = [], [*kept["in_place"]["means"], *kept["in_place"]["squares"]]
    else:
        copies = [m for m in kept["masters"] if m is not None]
        states = [s[k] for s in kept["adamw"]["state"].values() for k in ("exp_avg", "exp_avg_sq")]
    config = agent(dtype=dtype, optimizer=dict(rounding=rounding, moments=moments))
    memory = memory_of(config, model_shape(str(folder), "test"))
    assert (memory.copies, memory.moments, memory.gradients) == (bytes_of(copies), bytes_of(states), taken[0])
    away = memory_of(replace(config, optimizer=replace(config.optimizer, offload="host")), model_shape(str(folder), ""))
    assert away.states == 0 and away.host_states == memory.states


def test_graphs_of_the_layers_keep_their_gradients_and_what_they_compute_with():
    shape, use = shape_of(small_model("llama").config), Use("cuda", 64)
    without, small, large = (memory_of(agent(graph_tokens=n, dtype="bfloat16"), shape, use) for n in (0, 512, 4096))
    kept = 2 * (shape.count() - shape.head.size - (0 if shape.tied else shape.embedding.size))
    assert without.gradients - small.gradients == kept and large.gradients == small.gradients
    assert without.graphs + kept < small.graphs and 8 * (small.graphs - kept) == large.graphs - kept
    assert small.step + small.gradients == without.step + without.gradients  # copies' gradients, in float32


def test_vllm_takes_as_many_prompt_tokens_of_a_small_model_as_its_largest_graph_holds():
    small, large = 3.5e6, 47e6  # parameters of a layer: SmolLM2-135M, Qwen2.5-1.5B
    assert vllm_tokens(256, small) == 256 + GRAPH_TOKENS and vllm_tokens(256, large) == VLLM_TOKENS
    assert vllm_tokens(2000, small) == GRAPH_REQUESTS + GRAPH_TOKENS and vllm_tokens(9000, large) == 9000


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_keys_and_values_to_the_byte(family):
    model = small_model(family)
    cache = SlotCache(4, 100)
    pieces = [Piece(slot, 0, 100) for slot in range(4)]
    plan = CachePlan(cache, pieces, [], torch.device("cpu"))
    with torch.no_grad():
        packed_forward(model, torch.ones(400, dtype=torch.int64), plan.positions_T, plan)
    memory = memory_of(agent(engine=EngineConfig(slots=4)), shape_of(model.config), Use("cpu", 100))
    assert memory.cache == cache.bytes()


def test_the_cache_does_not_grow_beyond_the_context():
    cache = SlotCache(2, 500)
    for tokens in (440, 450):
        cache.reserve(2, tokens)
    assert cache.capacity == 512  # 500 in steps of 64; without the bound a quarter more than the 448 of before
    cache.reserve(2, 600)
    assert cache.capacity >= 600


def test_more_tokens_take_more_and_recomputation_less():
    shape = shape_of(small_model("llama").config)
    for size, how in itertools.product((2, 4), ("block", "modules", "plain")):
        peaks = [activations(shape, t, size=size, how=how, recompute=False).saved for t in (64, 128, 1024)]
        assert peaks == sorted(peaks) and peaks[0] < peaks[1]
        saved = [activations(shape, 128, size=size, how=how, recompute=again).saved for again in (True, "mlp", False)]
        assert saved[0] < saved[1] < saved[2]
    by_kind = [activations(shape, 64, size=2, how=k, recompute=False).saved for k in ("block", "modules", "plain")]
    assert by_kind == sorted(by_kind)


def test_everything_grows_with_what_makes_it_grow():
    shape = shape_of(small_model("llama").config)
    base = agent(train="lora", engine=EngineConfig(slots=8))
    larger = {
        "cache": replace(base, engine=EngineConfig(slots=16)),
        "weights": replace(base, lora=LoraConfig(rank=64)),
        "activations": replace(base, micro_batch_tokens=512),
        "moments": replace(base, train="full"),
    }
    for field, config in larger.items():
        assert getattr(memory_of(config, shape), field) > getattr(memory_of(base, shape), field), field


def test_four_bits_take_less_than_sixteen_and_a_cpu_computes_in_float32():
    shape = shape_of(small_model("llama").config)
    wide, narrow = (memory_of(agent(train="lora", dtype="bfloat16", quantize=q), shape) for q in ("none", "nf4"))
    linear = sum(m.size for m in shape.linears)
    assert wide.weights - narrow.weights == pytest.approx(linear * (2 - 0.5159), rel=1e-3)
    assert [weight_size(agent(dtype=d), p) for d, p in itertools.product(["auto", "float16"], ["cpu", "cuda"])] == [
        4, 2, 2, 2
    ]  # fmt: skip


def test_an_engine_of_another_precision_takes_what_its_own_numbers_take():
    shape, use = shape_of(small_model("llama").config), Use("cuda:0", 64)

    def planned(**more):
        engine = EngineConfig(name="vllm", weights="copy", slots=4, **more)
        return memory_of(agent(engine=engine, dtype="float32"), shape, use)

    plain, halved, eighth = planned(), planned(dtype="bfloat16"), planned(dtype="bfloat16", quantization="fp8")
    assert plain.cache == 2 * halved.cache and plain.weights == halved.weights
    assert plain.engine - halved.engine >= 2 * shape.count()
    assert halved.engine - eighth.engine == sum(m.size for m in shape.linears)


def test_a_step_of_the_embedded_engine_is_planned_as_it_is_cut(tmp_path):
    trainer = make_agent(save_model(tmp_path, "llama"))
    engine = EmbeddedEngine(trainer.model, trainer.tokenizer, slots=4)
    assert engine._batcher._budget == prompt_tokens("cpu", 48) == 1024
    budgets = [prompt_tokens("cuda", width) for width in (1536, 8960, 14336, 2**20)]
    assert logit_rows("mps", 1000) == logit_rows("cuda", 1000) > logit_rows("cpu", 1000)
    assert prompt_tokens("xpu", 1536) == budgets[0] == 8192 > budgets[1] > budgets[2] > budgets[3] == 1024
    llama = shape_of(small_model("llama", intermediate_size=14336).config)
    configs = [agent(train="lora", dtype="bfloat16", engine=EngineConfig(slots=slots)) for slots in (4, 64)]
    narrow, wide = (memory_of(config, llama, Use("cuda", 2048)).engine for config in configs)
    assert wide > narrow > budgets[2] * 2 * 4 * 14336  # gate, up, and the outputs of its adapter
