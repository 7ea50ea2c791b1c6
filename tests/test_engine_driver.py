"""The task that steps an engine: its end reaches those that wait, in this process and from a worker's."""

from __future__ import annotations

import asyncio
import gc
import io

import pytest

from ilr_fast.engines.driver import Driver
from ilr_fast.hosts import messages
from ilr_fast.hosts.worker import Worker
from ilr_fast.types import Sampling


class Counting:
    """Answers each request after some steps, or raises `fault`."""

    def __init__(self, steps: int = 3, fault: BaseException | None = None):
        self.left, self.steps, self.fault = steps, steps, fault
        self.futures: list[asyncio.Future[int]] = []
        self.driver = Driver(self.step, lambda: self.futures)

    def step(self) -> bool:
        if not self.futures:
            return False
        self.left -= 1
        if self.left == 0:
            if self.fault is not None:
                raise self.fault
            self.left = self.steps
            self.futures.pop(0).set_result(self.steps)
        return True

    async def generate(self, *asked: object) -> int:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.futures.append(future)
        self.driver.wake()
        return await future


async def both(engine: Counting) -> list[int | BaseException]:
    asked = asyncio.gather(engine.generate(), engine.generate(), return_exceptions=True)
    return await asyncio.wait_for(asked, 5)


def test_it_steps_while_there_is_work_and_again_in_another_loop() -> None:
    engine = Counting()
    assert [asyncio.run(both(engine)) for _ in range(2)] == [[3, 3], [3, 3]]


def test_whole_garbage_collections_wait_for_the_last_engine() -> None:
    before, seen = gc.get_threshold(), []
    one, two = Counting(4), Counting(2)

    async def both_of_them() -> None:
        await asyncio.gather(*(ended(one), ended(two)))

    async def ended(engine: Counting) -> None:
        await engine.generate()
        seen.append(gc.get_threshold())

    asyncio.run(both_of_them())
    assert [threshold[:2] for threshold in seen] == [before[:2]] * 2
    assert all(threshold[2] > 1000 * before[2] for threshold in seen) and gc.get_threshold() == before


def test_a_fault_reaches_everyone_who_waits() -> None:
    fault = AssertionError("a slot is held twice")
    assert asyncio.run(both(Counting(fault=fault))) == [fault, fault]


def test_an_interruption_ends_the_loop_and_prints_nothing(caplog) -> None:
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(Counting(fault=KeyboardInterrupt()).generate())
    gc.collect()
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize("lockstep", [False, True])
def test_an_engines_fault_ends_its_process(monkeypatch, lockstep) -> None:
    monkeypatch.setattr(Worker, "_read", lambda self: None)
    worker = Worker(io.BytesIO(), io.BytesIO())
    worker._host, worker._lockstep = Counting(fault=AssertionError("a slot is held twice")), lockstep  # type: ignore[assignment]
    worker._host.stats = lambda: {"steps": 0}  # type: ignore[method-assign, assignment, return-value]
    requests = [[7, [1], messages.from_sampling(Sampling(max_tokens=1))]]
    calls = [{"call": "generate", "arguments": {"requests": requests}}]
    if lockstep:
        calls = [{"call": "advance", "id": 8, "arguments": {"requests": requests, "cancelled": []}}]
    for call in calls:
        worker._inbox.put(call)
    with pytest.raises(AssertionError, match="held twice"):
        asyncio.run(asyncio.wait_for(worker.serve(), 5))


class Steps(Counting):
    """Its steps take so many passes of the event loop; the order of all is in `log`."""

    def __init__(self, name: str, passes: int, log: list[str], steps: int = 6):
        super().__init__(steps)
        self.name, self.passes, self.log = name, passes, log
        self.driver = Driver(self.stepwise, lambda: self.futures, paced=True)

    async def stepwise(self) -> bool:
        if self.futures:
            self.log.append(self.name)
        for _ in range(self.passes):
            await asyncio.sleep(0)
        return self.step()


def test_engines_of_a_process_keep_step() -> None:
    log: list[str] = []
    small, large = Steps("small", 1, log), Steps("large", 50, log)

    async def run() -> None:
        await asyncio.gather(small.generate(), large.generate())
        await small.generate()  # alone it waits for nobody
        log.append("now")
        await asyncio.gather(small.generate(), large.generate())  # and it begins where the other one is

    asyncio.run(asyncio.wait_for(run(), 5))
    for part in (log[:12], log[log.index("now") + 1 :]):
        counts = [(part[:n].count("small"), part[:n].count("large")) for n in range(len(part) + 1)]
        assert all(abs(small - large) <= 1 for small, large in counts) and counts[-1] == (6, 6), part
