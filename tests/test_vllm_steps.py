"""Engines that are each kept two steps ahead, by vLLM's own queue of steps under way; the GPU is stood in for."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


class Computed:
    """A step on the GPU: it is done once it was asked for so often, or at once where the host waits for it."""

    def __init__(self, number: int, asked: int, log: list[str], name: str):
        self.number, self.left, self._log, self._name = number, asked, log, name
        self.async_output = self.copy_event = self

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0

    def result(self) -> int:
        self._log.append(f"{self._name} {'takes' if self.left < 0 else 'waits for'} {self.number}")
        return self.number


def steps_of(name: str, log: list[str], steps: int, asked: int = 3) -> Any:
    """`Steps` on vLLM's core with work for so many steps, which each give their number."""
    from vllm.v1.engine.core import EngineCore

    from ilr_fast.engines.vllm_steps import Steps

    left = iter(range(steps))
    taken: list[int] = []

    def schedule(*_: Any) -> Any:
        number = next(left)
        log.append(f"{name} begins {number}")
        return SimpleNamespace(total_num_scheduled_tokens=1, pending_structured_output_tokens=False, number=number)

    def update(scheduled: Any, number: int) -> Any:
        taken.append(number)
        return {0: SimpleNamespace(outputs=[number])}

    scheduler = SimpleNamespace(
        has_requests=lambda: len(taken) < steps, schedule=schedule, update_from_output=update,
        get_grammar_bitmask=lambda _: None, held=0,
    )  # fmt: skip
    core: Any = object.__new__(EngineCore)
    vars(core).update(
        scheduler=scheduler, batch_queue=deque(maxlen=2), batch_queue_size=2, is_mm_encoder_only=False,
        is_pooling_model=False, is_ec_consumer=True, _should_throttle_prefills=lambda: False,
        log_error_detail=lambda _: nullcontext(),
        model_executor=SimpleNamespace(
            execute_model=lambda scheduled, non_block: setattr(core, "last", scheduled.number),
            sample_tokens=lambda *_, non_block: Computed(core.last, asked, log, name),
        ),
    )  # fmt: skip
    return Steps(SimpleNamespace(engine_core=core)), taken


async def driven(steps: Any, number: int, beside: bool) -> list[int]:
    found: list[int] = []
    while len(found) < number - 1:  # the last step is left under way
        found += await steps.next(beside=beside, meanwhile=lambda: False)
        await asyncio.sleep(0)
    return found


def test_both_engines_are_two_steps_ahead_and_nobody_waits() -> None:
    log: list[str] = []
    one, two = (steps_of(name, log, 6)[0] for name in ("one", "two"))

    async def both() -> list[list[int]]:
        return list(await asyncio.gather(driven(one, 5, True), driven(two, 5, True)))

    assert asyncio.run(both()) == [[0, 1, 2, 3]] * 2
    assert not [line for line in log if "waits" in line]
    assert log[:8] == [f"{name} begins {n}" for n in (0, 1) for name in ("one", "two")] + [
        f"{name} {what}" for what in ("takes 0", "begins 2") for name in ("one", "two")
    ]
    assert one.client.engine_core.batch_queue_size == 2


def test_what_is_under_way_is_drained_once() -> None:
    steps, taken = steps_of("one", [], 6)
    assert asyncio.run(driven(steps, 3, True)) == [0, 1]
    assert len(steps.client.engine_core.batch_queue) == 1
    assert steps.drain() == [2] and steps.drain() == [] and taken == [0, 1, 2]


def test_a_step_that_could_not_be_computed_says_why() -> None:
    steps, _ = steps_of("one", [], 3)
    core = steps.client.engine_core

    def failed() -> None:
        raise RuntimeError("out of memory")

    core.batch_queue.append((SimpleNamespace(result=lambda: None), None, SimpleNamespace(result=failed)))
    with pytest.raises(RuntimeError, match="out of memory"):
        steps.drain()


def test_what_waits_is_done_until_the_results_are_there() -> None:
    log: list[str] = []
    steps, _ = steps_of("one", log, 4, asked=3)

    async def meanwhile() -> list[list[int]]:
        return [await steps.next(beside=False, meanwhile=lambda: log.append("works") or True) for _ in range(3)]

    assert asyncio.run(meanwhile()) == [[], [0], [1]]
    assert log == ["one begins 0", "one begins 1", *["works"] * 3, "one takes 0", "one begins 2", *["works"] * 3,
                   "one takes 1"]  # fmt: skip
