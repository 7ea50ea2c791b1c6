"""vLLM on the trainer's weights or a copy: an update is what it samples from next, whatever was cached or slept.

Run by `make test-vllm`, in an environment of its own; skipped where vLLM is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_engine_embedded import log_probs, prompts_of, run
from vllm_engines import engine_for, expected, next_request_sees
from vllm_models import small_model

from ilr_fast.engines import vllm_memory
from ilr_fast.engines.device_memory import OutOfMemory
from ilr_fast.errors import UserError
from ilr_fast.types import Generation, Sampling
from ilr_fast.weights import WeightCopy

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("weights", ["share", "copy"])
def test_a_change_of_one_parameter_is_what_the_next_request_samples_from(weights: str) -> None:
    model = small_model("llama")
    values = model.model.layers[0].self_attn.v_proj.weight
    next_request_sees(engine_for(model, weights=weights), model, lambda: values.mul_(-3))


@pytest.mark.parametrize("weights", ["share", "copy"])
def test_an_optimizer_step_is_seen(weights: str) -> None:
    model = small_model("qwen3", tied=True)
    engine = engine_for(model, weights=weights)
    assert engine.shares == (weights == "share")
    whole = sum(p.nbytes for p in model.parameters())
    assert (engine.extra_weight_bytes() < 0.1 * whole) if engine.shares else (engine.extra_weight_bytes() >= whole)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    engine.weights_changed()
    prompt = prompts_of([30])[0]
    result = run(engine, [prompt], [Sampling(8, seed=1)])[0]
    assert result.logps == expected(model, prompt, result)


def test_an_engine_of_another_precision_gets_every_update() -> None:
    model = small_model("llama")
    with pytest.raises(UserError, match=r"tokens.weight is .*float32 in the trainer and .*bfloat16 in the engine"):
        engine_for(model, dtype=torch.bfloat16)
    engine = engine_for(model, dtype=torch.bfloat16, weights="copy")
    assert {p.dtype for p in engine._core.model.parameters()} == {torch.bfloat16} and model.dtype == torch.float32
    prompt, sampling = prompts_of([60])[0], [Sampling(12, seed=n) for n in range(8)]

    def difference() -> float:
        results = run(engine, [prompt] * 8, sampling)
        pairs = [zip(r.logps, log_probs(model, prompt, r.tokens, 1.0), strict=True) for r in results]
        return max(abs(a - b) for pair in pairs for a, b in pair)

    assert 1e-4 < difference() < 0.3, "the engine rounds"
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-3)
    engine.forget()
    assert difference() > 1
    engine.weights_changed()
    assert difference() < 0.3


def test_weights_that_the_engine_makes_something_else_of_come_through_its_reloading() -> None:
    model = small_model("qwen2", tied=True)
    engine = engine_for(model, weights="copy")
    places = {name: p.data_ptr() for name, p in engine._core.model.named_parameters()}
    engine._copy = WeightCopy(model, engine._core.model, "here", engine._core.reload)
    prompt, sampling = prompts_of([60])[0], Sampling(8, temperature=0)
    before = run(engine, [prompt], [sampling])[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    engine.weights_changed()
    after = run(engine, [prompt], [sampling])[0]
    assert after.logps != before.logps and after.logps == expected(model, prompt, after)
    found = {name: p.data_ptr() for name, p in engine._core.model.named_parameters()}
    assert found == places, "CUDA graphs read where they were captured"


def test_vllm_knows_the_quantizations_by_their_names() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from ilr_fast.hosts.local import QUANTIZATIONS

    names = [name for name in QUANTIZATIONS.values() if name is not None]
    assert names and set(names) <= set(QUANTIZATION_METHODS) and all(map(get_quantization_config, names))


def test_forgetting_drops_the_cache_and_copies_no_weights() -> None:
    model = small_model("llama")
    engine = engine_for(model, weights="copy")
    prompt, greedy = prompts_of([200])[0], Sampling(4, temperature=0)
    before = run(engine, [prompt], [greedy])[0]
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-3)
    engine.forget()
    reused = engine.stats().tokens_reused
    assert run(engine, [prompt], [greedy])[0].tokens == before.tokens and engine.stats().tokens_reused == reused
    engine.weights_changed()
    assert run(engine, [prompt], [greedy])[0].tokens != before.tokens


@pytest.mark.parametrize("weights", ["share", "copy"])
def test_an_engine_that_slept_has_forgotten_and_samples_from_the_update(weights: str) -> None:
    model = small_model("llama")
    engine = engine_for(model, weights=weights, sleeps=True)
    prompt, greedy = prompts_of([200])[0], Sampling(4, temperature=0)
    before, reused = run(engine, [prompt], [greedy])[0], engine.stats().tokens_reused
    engine.reside("training")
    engine.reside("awake")
    assert run(engine, [prompt], [greedy])[0].tokens == before.tokens and engine.stats().tokens_reused == reused
    engine.reside("training")
    with pytest.raises(AssertionError, match="memory"):
        run(engine, [prompt], [greedy])
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-3)
    engine.weights_changed()
    engine.reside("away")
    engine.reside("awake")
    after = run(engine, [prompt], [greedy])[0]
    assert after.tokens[0] != before.tokens[0] and after.logps == expected(model, prompt, after)
    assert engine.stats().tokens_reused == reused


def test_what_an_engine_gives_back_no_other_engine_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models with equal rotary embeddings, for which vLLM has one table in a process."""
    from ilr_fast.engines import vllm_core

    class Pool:
        def filling(self) -> Any:
            return contextlib.nullcontext()

    def apart() -> Any:
        regions = {"weights": Pool(), "kv_cache": Pool()}
        monkeypatch.setattr(vllm_core, "filling", lambda _: vllm_memory.filling(regions))
        return engine_for(small_model("llama"))._core.model

    def tables(model: Any) -> set[int]:
        return {m.cos_sin_cache.data_ptr() for m in model.modules() if hasattr(m, "cos_sin_cache")}

    first, second = apart(), apart()
    assert tables(first) and not tables(first) & tables(second)


def test_no_memory_to_wake_into_is_the_users_to_solve() -> None:
    class Full:
        def release(self, *, keep: bool) -> int:
            return 0

        def restore(self) -> int:
            raise OutOfMemory(3 * 2**30, 2**30)

    engine = engine_for(small_model("llama"), sleeps=True, where="agents.ada")
    engine._core = replace(engine._core, cache=Full())
    engine.reside("training")
    with pytest.raises(UserError, match=r"agents\.ada\.engine: 3 GiB are needed and 1 GiB .*\n.*engine\.sleep: turns"):
        engine.reside("awake")


def test_weights_that_change_while_a_request_runs_are_used_from_then_on() -> None:
    model = small_model("llama")
    engine, prompts = engine_for(model), prompts_of([6, 30])

    async def interrupted() -> list[Generation]:
        requests = [asyncio.create_task(engine.generate(p, Sampling(12, seed=2))) for p in prompts]
        while engine.stats().tokens_generated < 6:
            await asyncio.sleep(0)
        engine.weights_changed()
        return [await r for r in requests]

    for prompt, result in zip(prompts, asyncio.run(interrupted()), strict=True):
        assert len(result.tokens) in range(1, 13) and result.logps == expected(model, prompt, result)


def test_a_parameter_that_leaves_the_shared_memory_is_noticed() -> None:
    model = small_model("llama")
    engine = engine_for(model)
    model.model.layers[2].mlp.gate_proj.weight.data = model.model.layers[2].mlp.gate_proj.weight.data.clone()
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.gate_proj\.weight"):
        engine.weights_changed()


def test_a_model_without_all_of_its_counterparts_is_refused_for_a_copy_too() -> None:
    model = small_model("gemma2", tied=False)  # vLLM ties its head
    with pytest.raises(UserError, match=r"lm_head\.weight .*\n.*embedded"):
        engine_for(model, weights="auto")
