"""Steps by vLLM's own queue of those under way; the GPU is stood in for."""

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


def test_one_is_computed_while_the_next_is_begun() -> None:
    log: list[str] = []
    steps, _ = steps_of("one", log, 4)
    assert [steps.step() for _ in range(4)] == [[], [0], [1], [2]]
    assert log == ["one begins 0", "one begins 1", "one waits for 0", "one begins 2", "one waits for 1", "one begins 3",
                   "one waits for 2"]  # fmt: skip
    assert steps.client.engine_core.batch_queue_size == 2


def test_what_is_under_way_is_drained_once() -> None:
    steps, taken = steps_of("one", [], 6)
    assert [steps.step() for _ in range(3)] == [[], [0], [1]]
    assert len(steps.client.engine_core.batch_queue) == 1
    assert steps.drain() == [2] and steps.drain() == [] and taken == [0, 1, 2]


@pytest.mark.parametrize("work", [1, 9])
def test_what_waits_is_done_until_the_results_are_there(work: int) -> None:
    log: list[str] = []
    steps, _ = steps_of("one", log, 4, asked=3)
    left = iter(range(work))

    def meanwhile() -> bool:
        log.append("works")
        return next(left, None) is not None

    assert [steps.step(meanwhile) for _ in range(2)] == [[], [0]]
    worked = min(3, work + 1)
    takes = "takes" if worked == 3 else "waits for"
    assert log == ["one begins 0", "one begins 1", *["works"] * worked, f"one {takes} 0"]


def test_what_a_step_gives_is_not_lost_where_nothing_is_left_to_compute() -> None:
    """vLLM waits for the step under way where the next one only tells the workers which requests have ended."""
    steps, taken = steps_of("one", [], 2)
    assert steps.step() == [] and steps.step() == [0]
    core = steps.client.engine_core
    told = SimpleNamespace(total_num_scheduled_tokens=0, pending_structured_output_tokens=False)
    core.model_executor.execute_model = lambda *_, non_block: Computed(2, 0, [], "one")
    core.scheduler.schedule = lambda *_: (setattr(core.scheduler, "has_requests", lambda: False), told)[1]
    vars(core).update(
        capture_iteration_details=lambda _: nullcontext(), _process_aborts_queue=lambda: None,
        _attach_iteration_details=lambda *_: None, _attach_weight_version=lambda *_: None,
    )  # fmt: skip
    assert steps.step() == [1, 2] == taken[1:]


def test_another_engines_steps_are_taken_while_one_waits() -> None:
    log: list[str] = []
    slow, _ = steps_of("slow", log, 3, asked=4)
    quick, _ = steps_of("quick", log, 3, asked=1)

    async def run(steps: Any) -> list[Any]:
        return [await steps.step_beside(lambda: False) for _ in range(3)]

    async def both() -> list[Any]:
        return await asyncio.gather(run(slow), run(quick))

    assert asyncio.run(both()) == [[[], [0], [1]]] * 2
    assert not any("waits for" in line for line in log[:-2]), log
    assert log.index("quick takes 0") < log.index("quick begins 2") < log.index("slow takes 0")


def test_a_wait_that_is_cut_off_loses_no_step() -> None:
    steps, taken = steps_of("one", [], 5, asked=10**9)

    async def cut() -> None:
        await steps.step_beside(lambda: False)
        task = asyncio.ensure_future(steps.step_beside(lambda: False))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(cut())
    assert len(steps.client.engine_core.batch_queue) == 2 and taken == []
    assert [steps.step() for _ in range(3)] == [[0, 1], [2], [3]] and taken == [0, 1, 2, 3]


def test_what_is_drained_while_it_is_waited_for_is_given_once() -> None:
    steps, taken = steps_of("one", [], 5, asked=10**9)

    async def drained() -> list[Any]:
        await steps.step_beside(lambda: False)
        task = asyncio.ensure_future(steps.step_beside(lambda: False))
        await asyncio.sleep(0)
        return [steps.drain(), await task]

    assert asyncio.run(drained()) == [[0, 1], []] and taken == [0, 1]


def test_a_step_that_could_not_be_computed_says_why() -> None:
    steps, _ = steps_of("one", [], 3)
    core = steps.client.engine_core

    def failed() -> None:
        raise RuntimeError("out of memory")

    core.batch_queue.append((SimpleNamespace(result=lambda: None), None, SimpleNamespace(result=failed)))
    with pytest.raises(RuntimeError, match="out of memory"):
        steps.drain()
