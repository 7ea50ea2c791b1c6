"""Slots and batches as bookkeeping, and a random load that mixes all of it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from ragged_softmax import RaggedSoftmax
from test_engine_embedded import END, VOCABULARY, engine_for, run, tiny_model

from ilr_fast.engines import cache
from ilr_fast.engines.batching import Batcher, Request
from ilr_fast.engines.slots import Placement, SlotTable
from ilr_fast.types import Sampling


def array(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def filled(table: SlotTable, *prompts: np.ndarray) -> list[Placement | None]:
    """Places the prompts, computing each wholly."""
    places = []
    for prompt in prompts:
        place = table.place(prompt)
        if place:
            table.extend(place.slot, prompt[place.common :])
        places.append(place)
    return places


def test_prefixes_are_found_in_any_slot_and_empty_slots_are_taken_first() -> None:
    table = SlotTable(3)
    places = filled(table, array(1, 2, 3), array(1, 2, 4), array(5))
    assert places == [Placement(0, 0, 0), Placement(1, 0, 2), Placement(2, 2, 0)]
    assert table.place(array(1)) is None, "no slot is idle"
    assert table.length_S.tolist() == [3, 3, 1]


def test_a_continued_slot_is_taken_over_and_the_oldest_is_overwritten() -> None:
    table = SlotTable(2)
    filled(table, array(1, 2), array(3, 4))
    table.free(1)
    table.free(0)
    table.begin_step()
    assert table.place(array(1, 2, 9)) == Placement(0, 0, 2)
    assert table.place(array(1, 2, 8)) == Placement(1, 0, 2)
    assert table.tokens_SL[1, :3].tolist() == [1, 2, -1]


def test_a_source_of_this_step_is_not_overwritten_in_it() -> None:
    table = SlotTable(2)
    filled(table, array(1, 2, 3))
    table.free(0)
    table.begin_step()
    assert table.place(array(1, 2, 7)) == Placement(1, 0, 2)
    assert table.place(array(8)) is None
    table.begin_step()
    assert table.place(array(8)) == Placement(0, 0, 0)


def test_a_long_prompt_takes_several_steps_and_nobody_overtakes() -> None:
    async def schedule() -> list[list[tuple[int, int]]]:
        batcher = Batcher(slots=4, token_budget=4)
        for prompt in ([1] * 10, [2] * 3, [3]):
            future = asyncio.get_running_loop().create_future()
            batcher.queue.append(Request(list(prompt), len(prompt), 99, Sampling(1), future))
        steps = []
        while batcher.queue or any(r.computed < r.prompt for r in batcher.running):
            step = batcher.schedule()
            steps.append([(r.tokens[0], piece.new) for r, piece in step.pieces.items()])
            for request in step.pieces:
                if request.computed == len(request.tokens):
                    request.tokens.append(9)
        return steps

    assert asyncio.run(schedule()) == [[(1, 4)], [(1, 4)], [(1, 2), (2, 2)], [(1, 1), (2, 1), (3, 1)]]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("name", "slots", "budget"), [("llama", 3, 5), ("gemma3", 5, 16), ("gemma2", 8, 1000)])
def test_a_random_load_gives_every_request_what_it_gets_alone(
    name: str, slots: int, budget: int, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared and nested prefixes, equal prompts, continued ones, more requests than slots, chunked prompts."""
    g = np.random.default_rng(4)
    model = tiny_model(name)
    prompts: list[list[int]] = []
    for _ in range(36):
        stem = prompts[g.integers(len(prompts))] if prompts and g.random() < 0.8 else []
        stem = stem[: g.integers(len(stem) + 1)] if g.random() < 0.5 else stem
        prompts.append((stem + g.integers(2, VOCABULARY, g.integers(0 if stem else 1, 9)).tolist())[:60])
    samplings = [Sampling(int(g.integers(1, 12)), seed=int(g.integers(3))) for _ in prompts]
    engine = engine_for(model, slots=slots, token_budget=budget, stop_tokens=[END])
    with monkeypatch.context() as patch:
        if ragged:  # as on a GPU, where soft-capped scores take the other way too
            patch.setattr(cache, "kernel_fits", lambda query, size, softcap, dropout: softcap is None)
            patch.setattr(cache, "torch_kernel", RaggedSoftmax)
        together = run(engine, prompts, samplings)
    stats = engine.stats()
    assert stats.tokens_prompt == sum(map(len, prompts)) and stats.tokens_reused > stats.tokens_prompt / 3
    alone = engine_for(model, slots=1)
    for prompt, sampling, result in zip(prompts, samplings, together, strict=True):
        alone.weights_changed()
        expected = run(alone, [prompt], [sampling])[0]
        assert result.tokens == expected.tokens
        assert result.logps == pytest.approx(expected.logps, abs=2e-5)
