"""vLLM in the trainer's process: a request's log-probs are the trainer's, and what can't be is said.

Run by `make test-vllm`, in an environment of its own; skipped where vLLM is missing.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
import torch
import transformers
from test_engine_embedded import VOCABULARY, prompts_of, run, tiny_tokenizer
from vllm_engines import engine_for, expected
from vllm_models import small_model

from ilr_fast.errors import UserError
from ilr_fast.types import Generation, Sampling

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def llama() -> Any:
    """A model and the engine on its weights, for the tests that leave the weights alone."""
    model = small_model("llama")
    return model, engine_for(model)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_the_trainer(llama: Any, temperature: float) -> None:
    model, engine = llama
    prompts = prompts_of([3, 17, 40, 9, 1, 12, 5, 2, 70, 33], shared=20)
    results = run(engine, prompts, [Sampling(12, temperature=temperature, seed=n) for n in range(10)])
    for prompt, result in zip(prompts, results, strict=True):
        assert result.finish in ("stop", "length") and len(result.tokens) == len(result.logps) > 0
        assert result.logps == expected(model, prompt, result, temperature or 1.0)
    if temperature == 0:
        with torch.inference_mode():
            tokens = model.generate(torch.tensor([prompts[2]]), max_new_tokens=12, do_sample=False)[0, 60:]
        assert results[2].tokens == tuple(tokens.tolist())


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_engines_own_noise(llama: Any, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    model, engine = llama
    prompts, samplings = prompts_of([3, 90, 40], shared=20), [Sampling(12, temperature=temperature, seed=3)] * 3
    engine.weights_changed()
    assert engine.noise() is None, "nothing was sampled"
    run(engine, prompts, samplings)
    noise = engine.noise()
    assert noise is not None and noise < 1e-6, "in float32 the two agree nearly"
    assert engine.noise() is None
    results = run(engine, prompts, samplings)
    monkeypatch.setattr(engine._noise, "_temperature", temperature / 2)  # prefilled under another temperature
    assert engine.noise() > 0.1
    assert run(engine, prompts, samplings)[0].logps == expected(model, prompts[0], results[0], temperature)


def test_greedy_and_sampled_requests_in_one_batch(llama: Any) -> None:
    model, engine = llama
    prompts = prompts_of([9, 9, 9, 9])
    temperatures = [0.0, 0.5, 0.0, 2.0]
    results = run(engine, prompts, [Sampling(8, temperature=t, seed=4) for t in temperatures])
    for prompt, temperature, result in zip(prompts, temperatures, results, strict=True):
        assert result.logps == expected(model, prompt, result, temperature or 1.0)


def test_a_seed_belongs_to_the_request(llama: Any) -> None:
    _, engine = llama
    prompt = prompts_of([9])[0]
    first = run(engine, [prompt] * 6, [Sampling(10, seed=s) for s in range(6)])
    again = run(engine, [prompt] * 6, [Sampling(10, seed=s) for s in (5, 4, 3, 2, 1, 0)])
    assert len({r.tokens for r in first}) == 6
    assert [r.tokens for r in again[::-1]] == [r.tokens for r in first]


def test_stops(llama: Any) -> None:
    _, engine = llama
    free = run(engine, [[4, 5]], [Sampling(20, seed=3)])[0]
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode(list(free.tokens[3:6]), skip_special_tokens=True)
    ended, other = run(engine, [[4, 5], [7, 8]], [Sampling(20, seed=3, stop=("@", text)), Sampling(20, seed=5)])
    assert ended.finish == "stop" and text not in ended.text
    assert ended.tokens == free.tokens[: len(ended.tokens)] and len(ended.tokens) <= 6 and other.finish != "error"
    assert text in tokenizer.decode(list(ended.tokens), skip_special_tokens=True)


def test_a_token_that_holds_a_stop_string_is_the_last_that_is_sampled(llama: Any) -> None:
    _, engine = llama
    tokenizer = tiny_tokenizer()
    free = run(engine, [[4, 5]], [Sampling(20, seed=3)])[0]
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in free.tokens]
    place = next(n for n in range(3, 15) if texts[n] and not any(texts[n] in text for text in texts[:n]))
    before = engine.stats().tokens_generated
    ended = run(engine, [[4, 5]], [Sampling(20, seed=3, stop=(texts[place],))])[0]
    assert ended.finish == "stop" and ended.tokens == free.tokens[: place + 1]
    assert engine.stats().tokens_generated - before == place + 1


def test_a_token_that_vllm_stops_at_is_an_end_also_where_its_text_is_another_after_others(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte that is a line's end alone is none after half a character."""
    _, engine = llama
    monkeypatch.setattr(engine._stops, "completed", lambda *_: False)
    text = tiny_tokenizer().decode(run(engine, [[4, 5]], [Sampling(20, seed=3)])[0].tokens[4:5])
    ended = run(engine, [[4, 5]], [Sampling(20, seed=3, stop=(text,))])[0]
    assert ended.finish == "stop" and len(ended.tokens) <= 5


def test_parameters_are_kept_for_a_kind_of_request_whatever_its_limit() -> None:
    from ilr_fast.engines.vllm_requests import Requests

    requests = Requests([2])
    asked = [requests.sampling(str(n), [4], Sampling(n, seed=n, turn=n), n, (5,)) for n in (3, 4)]
    formed = [one.sampling_params for one in asked]
    assert [(one.max_tokens, one.seed) for one in formed] == [(3, 3), (4, 4)] and len(requests._known) == 1
    assert asked[1].priority < asked[0].priority < requests.sampling("5", [4] * 200, Sampling(9, turn=2), 9).priority


def test_stop_tokens_are_kept_and_contexts_end() -> None:
    model = small_model("llama")
    free = run(engine_for(model, stop_tokens=[], max_context=40), [[4, 5], [3] * 35], [Sampling(50, seed=8)] * 2)
    assert len(free[0].tokens) == 38 and len(free[1].tokens) == 5 and free[1].finish == "length"
    stop = free[0].tokens[6]
    ended = run(engine_for(model, stop_tokens=[stop], max_context=40), [[4, 5]], [Sampling(50, seed=8)])[0]
    assert ended.finish == "stop" and ended.tokens == free[0].tokens[: free[0].tokens.index(stop) + 1]


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], Sampling(4), "empty"),
        ([2] * 256, Sampling(4), "context"),
        ([2, VOCABULARY], Sampling(4), "vocabulary"),
        ([2], Sampling(0), "max_tokens"),
    ],
)
def test_a_bad_request_fails_alone(llama: Any, prompt: list[int], sampling: Sampling, message: str) -> None:
    bad, good = run(llama[1], [prompt, [5, 6]], [sampling, Sampling(4)])
    assert bad.finish == "error" and message in (bad.error or "") and bad.tokens == ()
    assert good.finish in ("stop", "length")


def test_logits_that_are_not_finite_are_an_error_and_leave_nothing_in_the_cache() -> None:
    model = small_model("llama")
    engine = engine_for(model)
    kept = model.model.embed_tokens.weight[9].clone()
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = float("nan")
    bad, good = run(engine, [[9] * 150, [2, 4]], [Sampling(5, temperature=0)] * 2)
    assert bad.finish == "error" and "finite" in (bad.error or "") and good.finish != "error"
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = kept
    assert run(engine, [[9] * 150], [Sampling(5, temperature=0)])[0].finish != "error"


def test_a_cancelled_request_makes_room() -> None:
    engine = engine_for(small_model("llama"), slots=1, stop_tokens=[])

    async def cancel_the_first() -> Generation:
        first = asyncio.create_task(engine.generate([3, 4], Sampling(200)))
        second = asyncio.create_task(engine.generate([5, 6], Sampling(3)))
        while engine.stats().tokens_generated < 2:
            await asyncio.sleep(0)
        first.cancel()
        return await second

    assert len(asyncio.run(cancel_the_first()).tokens) == 3
    assert engine.stats().tokens_generated < 12


@pytest.mark.parametrize("seeded", [True, False])
def test_two_engines_of_different_models_alternate(seeded: bool) -> None:
    models = [small_model("llama"), small_model("gemma3", vocab_size=57)]
    engines = [engine_for(m, stop_tokens=[], seeded=seeded) for m in models]
    steps: list[int] = []
    for number, engine in enumerate(engines):
        take = engine._take
        engine._take = lambda outputs, take=take, number=number: (steps.append(number), take(outputs))[1]

    async def both() -> list[Generation]:
        return list(await asyncio.gather(*(e.generate([3, 4], Sampling(10, seed=5)) for e in engines)))

    results = asyncio.run(both())
    assert steps == [0, 1] * 10
    for model, result in zip(models, results, strict=True):
        assert result.logps == expected(model, [3, 4], result)


def test_closing_an_engine_leaves_the_others_running_and_new_ones_can_follow() -> None:
    models = [small_model("llama"), small_model("smollm3", tied=True)]
    first, second = (engine_for(m) for m in models)
    first.close()
    for model, engine in zip(models[::-1], [second, engine_for(models[0])], strict=True):
        result = run(engine, [[3, 4, 5]], [Sampling(6, seed=1)])[0]
        assert result.logps == expected(model, [3, 4, 5], result)


def test_a_cores_graphs_are_captured_into_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cores before it were closed, and their graphs' memory is gone; the GPU is stood in for."""
    from ilr_fast.engines import vllm_core

    class Platform:
        _global_graph_pool = "of a core that was closed"

    monkeypatch.setattr(vllm_core, "_open", set())
    assert vllm_core._stream_of_its_own(Platform(), torch.device("cuda")) is None
    assert Platform._global_graph_pool is None


def test_the_process_is_left_as_it_was() -> None:
    model = small_model("llama")
    before, threads = os.environ.get("LD_PRELOAD"), torch.get_num_threads()
    state = torch.random.get_rng_state()
    engine = engine_for(model)
    assert engine.shares
    assert os.environ.get("LD_PRELOAD") == before
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"max_context": 512}, "max_context"),
        ({"cache_gib": 1e-5}, "cache_gib"),
        ({"cache_gib": 1e6}, "cache_gib"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(options: dict[str, Any], place: str) -> None:
    with pytest.raises(UserError, match=rf"agents\.ada\.engine\.{place}"):
        engine_for(small_model("llama"), where="agents.ada", **options)


def test_a_model_that_vllm_does_not_know_is_named_with_a_remedy() -> None:
    config = transformers.CodeGenConfig(vocab_size=61, n_embd=64, n_layer=2, n_head=2, n_positions=256, rotary_dim=16)
    with pytest.raises(UserError) as found:
        engine_for(transformers.AutoModelForCausalLM.from_config(config), where="agents.ada")
    assert "agents.ada.engine.name" in str(found.value) and "CodeGenForCausalLM" in str(found.value)
    assert "embedded" in str(found.value) and len(str(found.value)) < 250, "not vLLM's list of all that it knows"


def test_rows_change_no_token_and_leave_the_same_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ilr_fast.engines import vllm_core

    def conversation() -> tuple[list[Generation], int]:
        engine = engine_for(small_model("llama"), stop_tokens=[])
        prompts = prompts_of([9, 20, 33])
        first = run(engine, prompts, [Sampling(n, seed=n) for n in (70, 83, 96)])
        longer = [[*p, *r.tokens, 3, 4] for p, r in zip(prompts, first, strict=True)]
        return [*first, *run(engine, longer, [Sampling(9, seed=4)] * 3)], engine.stats().tokens_reused

    rows = conversation()
    monkeypatch.setattr(vllm_core, "rollout_scheduler", lambda base: base)
    plain = conversation()
    for ours, theirs in zip(rows[0], plain[0], strict=True):
        assert ours.tokens == theirs.tokens and ours.logps == pytest.approx(theirs.logps, abs=1e-5)
    assert rows[1] == plain[1] >= 3 * 64
