"""vLLM on a GPU: engines of 8-bit weights, and engines of one process after and beside each other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
import vllm_engines
from test_engine_embedded import prompts_of, run
from vllm_models import small_model

from ilr_fast.types import Generation, Sampling

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore"),
]
SIZES = dict(hidden_size=256, intermediate_size=512, num_attention_heads=2, head_dim=128)


def on_the_gpu(family: str) -> Any:
    """In bfloat16, its weights of a scale that keeps activations' size."""
    model = small_model(family, tied=True, **SIZES).to("cuda", torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if name.endswith("norm.weight") else parameter.mul_(0.3)
    return model


def engine_for(model: Any, **options: Any) -> Any:
    return vllm_engines.engine_for(model, slots=16, cache_gib=0.2, **options)


def difference(model: Any, prompts: list[list[int]], results: list[Generation]) -> float:
    """Mean |log-prob of the trainer − log-prob of the engine| of the sampled tokens, in nats."""
    found = []
    for prompt, result in zip(prompts, results, strict=True):
        assert result.finish != "error", result.error
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *result.tokens]], device=model.device)).logits[0]
        logps_TV = logits_TV[len(prompt) - 1 : -1].float().log_softmax(-1)
        trainer = logps_TV[range(len(result.tokens)), list(result.tokens)].tolist()
        found += [abs(a - b) for a, b in zip(trainer, result.logps, strict=True)]
    return sum(found) / len(found)


PROMPTS = prompts_of([3, 17, 40, 9, 1, 12, 5, 2, 70, 33] * 3, shared=20)
SAMPLINGS = [Sampling(24, seed=n) for n in range(len(PROMPTS))]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_an_engine_of_8_bit_weights_gets_every_update(family: str) -> None:
    from ilr_fast.hosts.local import QUANTIZATIONS

    model = on_the_gpu(family)
    engine = engine_for(model, quantization=QUANTIZATIONS["fp8"], weights="copy")
    held = {name: p.data_ptr() for name, p in engine._core.model.named_parameters()}
    assert torch.float8_e4m3fn in {p.dtype for p in engine._core.model.parameters()}
    assert 1e-4 < difference(model, PROMPTS, run(engine, PROMPTS, SAMPLINGS)) < 0.3, "the engine rounds to 8 bits"
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(-3)
            layer.mlp.up_proj.weight.mul_(-2)
    engine.forget()
    untold = difference(model, PROMPTS, run(engine, PROMPTS, SAMPLINGS))
    engine.weights_changed()
    told = difference(model, PROMPTS, run(engine, PROMPTS, SAMPLINGS))
    assert told < 0.3 and untold > 2 * told
    assert held == {name: p.data_ptr() for name, p in engine._core.model.named_parameters()}, "CUDA graphs read there"
    engine.close()


def test_engines_of_one_process_after_and_beside_each_other() -> None:
    """A core that opens when others are closed or run captures graphs of its own, and changes nothing of theirs."""
    models = {family: on_the_gpu(family) for family in ("qwen2", "llama")}
    for family in ("qwen2", "llama"):
        engine = engine_for(models[family])
        assert difference(models[family], PROMPTS, run(engine, PROMPTS, SAMPLINGS)) < 0.05
        engine.close()
    engines = {family: engine_for(model) for family, model in models.items()}

    async def both() -> list[list[Generation]]:
        asked = [[e.generate(p, s) for p, s in zip(PROMPTS, SAMPLINGS, strict=True)] for e in engines.values()]
        return [list(one) for one in await asyncio.gather(*(asyncio.gather(*one) for one in asked))]

    for model, results in zip(models.values(), asyncio.run(both()), strict=True):
        assert difference(model, PROMPTS, results) < 0.05
    engines["llama"].close()
    assert difference(models["qwen2"], PROMPTS, run(engines["qwen2"], PROMPTS, SAMPLINGS)) < 0.05
    engines["qwen2"].close()
