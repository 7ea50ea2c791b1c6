"""The embedded engine against transformers' `generate`, and what must not change a request's tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models

from ilr_fast.engines.embedded import EmbeddedEngine
from ilr_fast.types import Generation, Sampling

VOCABULARY = 61
END = 1
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "gemma2": (
        transformers.Gemma2Config,
        dict(sliding_window=7, layer_types=SLIDING, attn_logit_softcapping=1.5, final_logit_softcapping=3.0),
    ),
    "gemma3": (transformers.Gemma3TextConfig, dict(sliding_window=6, layer_types=SLIDING)),
}


def tiny_model(name: str) -> transformers.PreTrainedModel:
    kind, extra = CONFIGS[name]
    config = kind(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=96,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=END,
        **extra,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Token n is spelled by one or two letters, so that stop strings span tokens; 0 and 1 are special."""
    vocabulary = {"<pad>": 0, "<end>": END} | {chr(97 + n % 26) * (1 + n // 30): n for n in range(2, 30)}
    vocabulary |= {f"{chr(97 + n % 26)}{chr(97 + n // 26)}": n for n in range(30, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def engine_for(model: torch.nn.Module, **options: object) -> EmbeddedEngine:
    return EmbeddedEngine(model, tiny_tokenizer(), **{"slots": 4, "stop_tokens": [END], **options})  # type: ignore[arg-type]


def run(engine: EmbeddedEngine, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> list[Generation]:
    async def all_of_them() -> list[Generation]:
        requests = (engine.generate(p, s) for p, s in zip(prompts, samplings, strict=True))
        return list(await asyncio.gather(*requests))

    return asyncio.run(all_of_them())


def prompts_of(lengths: Sequence[int], seed: int = 0, shared: int = 0) -> list[list[int]]:
    g = np.random.default_rng(seed)
    prefix = g.integers(2, VOCABULARY, shared).tolist()
    return [prefix + g.integers(2, VOCABULARY, n).tolist() for n in lengths]


def log_probs(model: transformers.PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int], temperature: float):
    """The log-probs of `tokens` after `prompt`, by an ordinary forward pass."""
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(tokens)), list(tokens)].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_and_logps_equal_those_of_generate(name: str) -> None:
    model = tiny_model(name)
    prompts = prompts_of([3, 17, 9, 1, 12, 5, 2], shared=0) + prompts_of([4, 4, 6], seed=1, shared=8)
    expected = []
    with torch.inference_mode():
        for prompt in prompts:
            out = model.generate(torch.tensor([prompt]), max_new_tokens=11, do_sample=False)[0, len(prompt) :].tolist()
            expected.append((out, log_probs(model, prompt, out, 1.0)))
    results = run(engine_for(model, token_budget=10), prompts, [Sampling(max_tokens=11, temperature=0)] * len(prompts))
    for (tokens, logps), result in zip(expected, results, strict=True):
        assert list(result.tokens) == tokens
        assert result.logps == pytest.approx(logps, abs=2e-5)
        assert result.finish == ("stop" if tokens[-1] == END else "length")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_request_gives_the_same_tokens_in_any_company(name: str) -> None:
    model = tiny_model(name)
    prompts = prompts_of([5, 9, 5, 14, 3, 8, 1, 6, 11], shared=6)
    samplings = [Sampling(max_tokens=4 + n, temperature=0.5 + 0.2 * n, seed=n % 4) for n in range(len(prompts))]
    together = run(engine_for(model, slots=9), prompts, samplings)
    narrow = run(engine_for(model, slots=2, token_budget=7), prompts[::-1], samplings[::-1])[::-1]
    alone = [run(engine_for(model), [p], [s])[0] for p, s in zip(prompts, samplings, strict=True)]
    assert [r.tokens for r in together] == [r.tokens for r in alone] == [r.tokens for r in narrow]
    for prompt, sampling, result in zip(prompts, samplings, together, strict=True):
        with torch.inference_mode():
            expected = log_probs(model, prompt, result.tokens, sampling.temperature)
        assert result.logps == pytest.approx(expected, abs=2e-5)


def test_the_same_requests_in_the_same_order_give_the_same_bits() -> None:
    model = tiny_model("qwen3")
    engine = engine_for(model, slots=3)
    prompts = prompts_of([5, 9, 5, 14, 3], shared=4)
    samplings = [Sampling(max_tokens=9, seed=n) for n in range(5)]
    first = run(engine, prompts, samplings)
    run(engine, prompts_of([20, 30], seed=5), samplings[:2])
    engine.weights_changed()
    assert run(engine, prompts, samplings) == first
    assert run(engine_for(model, slots=3), prompts, samplings) == first


def test_seeds_differ_and_equal_prompts_sample_from_one_row() -> None:
    engine, prompt = engine_for(tiny_model("llama"), slots=8), prompts_of([9])[0]
    results = run(engine, [prompt] * 8, [Sampling(max_tokens=6, seed=s) for s in range(8)])
    assert len({r.tokens for r in results}) > 4
    stats = engine.stats()
    assert stats.tokens_prompt == 8 * 9 and stats.tokens_reused == 7 * 9
    assert stats.tokens_generated == sum(len(r.tokens) for r in results)
    assert stats.steps <= 6


def test_the_next_turn_reuses_its_own_slot_and_gives_the_same_tokens() -> None:
    model = tiny_model("gemma3")
    prompts, more = prompts_of([7, 9, 8]), prompts_of([5, 2, 6], seed=3)
    sampling = Sampling(max_tokens=8, seed=11)

    def second_turns(forgetful: bool) -> tuple[list[Generation], int]:
        engine = engine_for(model)
        firsts = run(engine, prompts, [sampling] * 3)
        if forgetful:
            engine.weights_changed()
        before = engine.stats().tokens_reused
        nexts = [[*p, *f.tokens, *m] for p, f, m in zip(prompts, firsts, more, strict=True)]
        return run(engine, nexts[::-1], [sampling] * 3), engine.stats().tokens_reused - before

    remembered, reused = second_turns(False)
    fresh, none = second_turns(True)
    assert [r.tokens for r in remembered] == [r.tokens for r in fresh]
    assert none == 0 and reused >= sum(len(p) for p in prompts)


def test_changed_weights_are_what_the_next_request_samples_from() -> None:
    model = tiny_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    engine, prompt, greedy = engine_for(model), prompts_of([6])[0], Sampling(max_tokens=3, temperature=0)
    with torch.no_grad():
        model.lm_head.bias[7] = 1e3
        assert run(engine, [prompt], [greedy])[0].tokens == (7, 7, 7)
        model.lm_head.bias[7] = 0
        before = run(engine, [prompt], [greedy])[0]
        for parameter in model.model.parameters():
            parameter.mul_(1.7)
        stale = run(engine, [prompt], [greedy])[0]
        engine.weights_changed()
        after = run(engine, [prompt], [greedy])[0]
        expected = log_probs(model, prompt, after.tokens, 1.0)
    assert engine.stats().tokens_reused > 0 and stale.logps != after.logps != before.logps
    assert after.logps == pytest.approx(expected, abs=2e-5)


def test_weights_changed_drops_the_cache_and_running_requests_go_on() -> None:
    model = tiny_model("llama")
    engine, prompts = engine_for(model), prompts_of([6, 3])

    async def interrupted() -> list[Generation]:
        requests = [asyncio.create_task(engine.generate(p, Sampling(max_tokens=12, seed=2))) for p in prompts]
        while engine.stats().tokens_generated < 6:
            await asyncio.sleep(0)
        assert engine.cache_bytes() > 0
        engine.weights_changed()
        assert engine.cache_bytes() == 0
        return [await r for r in requests]

    expected = run(engine_for(model), prompts, [Sampling(12, seed=2)] * 2)
    for result, one in zip(asyncio.run(interrupted()), expected, strict=True):
        assert result.tokens == one.tokens and result.logps == pytest.approx(one.logps, abs=2e-5)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], Sampling(4), "empty"),
        ([2] * 96, Sampling(4), "context"),
        ([2, VOCABULARY], Sampling(4), "vocabulary"),
        ([2, -1], Sampling(4), "vocabulary"),
        ([2], Sampling(0), "max_tokens"),
        ([2], Sampling(4, temperature=-1.0), "temperature"),
        ([2], Sampling(4, top_p=0.0), "top_p"),
        ([2], Sampling(4, stop=("",)), "stop string"),
    ],
)
def test_a_bad_request_fails_alone(prompt: list[int], sampling: Sampling, message: str) -> None:
    engine = engine_for(tiny_model("llama"))
    bad, good = run(engine, [prompt, [5, 6]], [sampling, Sampling(4)])
    assert bad.finish == "error" and message in (bad.error or "") and bad.tokens == ()
    assert good.finish in ("stop", "length") and engine.stats().failed == 1


def test_logits_that_are_not_finite_and_a_model_that_raises_are_errors() -> None:
    model = tiny_model("llama")
    engine = engine_for(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = float("nan")
    bad, good = run(engine, [[3, 9], [2, 4]], [Sampling(5, temperature=0)] * 2)
    assert bad.finish == "error" and "finite" in (bad.error or "")
    assert good.finish != "error"
    assert run(engine, [[3, 4]], [Sampling(5)])[0].finish != "error", "the failed request's keys are not reused"
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    assert "ZeroDivisionError" in (run(engine, [[2, 4]], [Sampling(5)])[0].error or "")
    hook.remove()
    assert run(engine, [[2, 4]], [Sampling(5, temperature=0)])[0].tokens == good.tokens


def test_generation_ends_at_the_context_and_at_stop_tokens() -> None:
    model = tiny_model("llama")
    result = run(engine_for(model, max_context=20, stop_tokens=[]), [[3] * 15], [Sampling(50)])[0]
    assert result.finish == "length" and len(result.tokens) == 5
    free = run(engine_for(model, stop_tokens=[]), [[4, 5]], [Sampling(12, seed=8)])[0]
    stop = free.tokens[6]
    ended = run(engine_for(model, stop_tokens=[stop]), [[4, 5]], [Sampling(12, seed=8)])[0]
    assert ended.finish == "stop" and ended.tokens == free.tokens[: free.tokens.index(stop) + 1]


def test_stop_strings_across_tokens() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    def text(tokens: Sequence[int]) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=True)

    free = run(engine_for(model, stop_tokens=[]), [[4, 5]], [Sampling(20, seed=3)])[0]
    for start in range(3, 9):
        tokens = free.tokens[: start + 3]
        whole, inner = text(tokens), text(free.tokens[start : start + 3])
        stop = inner[1:] if len(inner) > 3 else inner
        ended = run(engine_for(model, stop_tokens=[]), [[4, 5]], [Sampling(20, seed=3, stop=("@", stop))])[0]
        assert ended.finish == "stop" and ended.text == whole[: whole.index(stop)]
        assert stop in text(ended.tokens) and stop not in text(ended.tokens[:-1])
        assert len(ended.logps) == len(ended.tokens)


def test_a_cancelled_request_frees_its_slot() -> None:
    engine = engine_for(tiny_model("llama"), slots=1, stop_tokens=[])

    async def cancel_the_first() -> Generation:
        first = asyncio.create_task(engine.generate([3, 4], Sampling(90)))
        second = asyncio.create_task(engine.generate([5, 6], Sampling(3)))
        while engine.stats().tokens_generated < 2:
            await asyncio.sleep(0)
        first.cancel()
        return await second

    assert len(asyncio.run(cancel_the_first()).tokens) == 3
    assert engine.stats().tokens_generated < 12


def test_training_mode_is_left_as_it_was_and_dropout_is_off() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.9, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_model("llama"), config)
    expected = run(engine_for(model.eval()), [[3, 4, 5]], [Sampling(8, seed=1)])
    model.train()
    model.base_model.model.model.norm.eval()
    assert run(engine_for(model), [[3, 4, 5]], [Sampling(8, seed=1)]) == expected
    assert model.training and not model.base_model.model.model.norm.training
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_dropout["default"].training


def test_two_engines_alternate_in_one_event_loop() -> None:
    engines = [engine_for(tiny_model("llama"), stop_tokens=[]), engine_for(tiny_model("qwen3"), stop_tokens=[])]
    steps: list[int] = []
    for number, engine in enumerate(engines):
        step = engine.step
        engine.step = lambda step=step, number=number: (steps.append(number), step())[1]  # type: ignore[method-assign]

    async def both() -> list[Generation]:
        return list(await asyncio.gather(*(e.generate([3, 4], Sampling(10, seed=5)) for e in engines)))

    assert all(len(r.tokens) == 10 for r in asyncio.run(both()))
    assert steps == [0, 1] * 10
