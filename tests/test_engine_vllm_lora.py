"""Adapters that are trained, in vLLM's buffers: log-probs are the trainer's before and after each update.

Run by `make test-vllm`, in an environment of its own; skipped where vLLM or peft is missing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine_embedded import log_probs, prompts_of, run
from vllm_engines import engine_for, expected, next_request_sees
from vllm_models import small_model

from ilr_fast.attention import prepare
from ilr_fast.errors import UserError
from ilr_fast.types import Sampling

peft = pytest.importorskip("peft")
pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def adapted(family: str, rank: int = 4, targets: str | list[str] = "all-linear", **options: Any) -> Any:
    """A small model with adapters as they are at first: B is 0."""
    model = small_model(family, **options)
    prepare(model)
    config = peft.LoraConfig(r=rank, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def update(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.normal_(std=0.3)


@pytest.mark.parametrize(
    ("family", "rank", "targets", "weights", "options"),
    [
        ("llama", 5, "all-linear", "share", {}),
        ("llama3", 1, ["q_proj", "v_proj"], "copy", {}),
        ("qwen2", 8, ["o_proj"], "share", {"tied": True}),
        ("qwen3", 40, ["gate_proj", "down_proj", "k_proj"], "share", {}),
        ("gemma2", 4, "all-linear", "share", {"tied": True}),
        ("gemma3", 4, "all-linear", "share", {}),
        ("smollm3", 4, "all-linear", "share", {}),
        ("mistral", 4, "all-linear", "auto", {}),
    ],
)
def test_log_probs_are_the_trainers(
    family: str, rank: int, targets: Any, weights: str, options: dict[str, Any]
) -> None:
    model = adapted(family, rank, targets, **options)
    engine = engine_for(model, weights=weights)
    assert engine.shares == (weights != "copy")
    prompts, said = prompts_of([3, 17, 40], shared=20), []
    for _ in range(3):
        results = run(engine, prompts, [Sampling(12, temperature=0.7, seed=n) for n in range(3)])
        for prompt, result in zip(prompts, results, strict=True):
            assert result.logps == expected(model, prompt, result, 0.7)
        assert engine.noise() < 1e-5
        said.append(results)
        update(model)
        engine.weights_changed()
    first = [log_probs(model, p, r.tokens, 0.7) for p, r in zip(prompts, said[0], strict=True)]
    assert first[0] != pytest.approx(list(said[0][0].logps), abs=1e-2), "an adapter that is not there changes nothing"
    engine.close()


def test_a_change_of_one_matrix_is_what_the_next_request_samples_from() -> None:
    model = adapted("llama")
    matrix = model.get_base_model().model.layers[0].self_attn.v_proj.lora_B["default"].weight
    next_request_sees(engine_for(model), model, lambda: matrix.normal_(std=3))


def test_without_its_adapter_a_shared_model_is_the_one_that_was_loaded() -> None:
    model, prompt, tokens = adapted("qwen2"), [3, 4, 5], (7, 8)
    loaded = log_probs(model, prompt, tokens, 1.0)
    engine = engine_for(model)
    update(model)
    engine.weights_changed()
    assert log_probs(model, prompt, tokens, 1.0) != pytest.approx(loaded, abs=1e-2)
    with model.disable_adapter():
        assert log_probs(model, prompt, tokens, 1.0) == pytest.approx(loaded, abs=1e-6)


def test_what_is_not_as_it_must_be_is_named() -> None:
    with pytest.raises(UserError, match=r"no place for the adapter of model\.embed_tokens"):
        engine_for(adapted("llama", targets=["embed_tokens", "q_proj"]))
    with pytest.raises(UserError, match=r"rank 600.*\n.*512"):
        engine_for(adapted("llama", rank=600, targets=["q_proj"]))
    model = adapted("llama")
    engine = engine_for(model)
    layer = model.get_base_model().model.layers[1].self_attn
    engine._adapter.check()
    buffers = engine._core.model.model.layers[1].self_attn.qkv_proj.lora_b_stacked
    buffers[2][0, 0, 3, 2] = 1
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_proj has other values"):
        engine._adapter.check()
    engine._adapter.write()
    buffers[2][0, 0, 3, 6] = 1
    with pytest.raises(UserError, match=r"an adapter of its own in model\.layers\.1\.self_attn\.qkv_proj"):
        engine._adapter.check()
    layer.v_proj.base_layer.weight.data = layer.v_proj.base_layer.weight.data.clone()
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_proj\.weight has moved"):
        engine.weights_changed()
