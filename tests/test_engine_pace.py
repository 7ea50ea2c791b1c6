"""Engines of several processes that keep step: by counts, for as long as the others have work and go on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ilr_fast.engines import driver, pace
from ilr_fast.engines.driver import Driver
from ilr_fast.engines.pace import PLACE, SEATS, Pace, paced
from ilr_fast.types import Sampling


@pytest.fixture
def file():
    """Where processes meet."""
    with paced() as environment:
        yield environment[PLACE]


@pytest.fixture
def seats(file, monkeypatch) -> list[Pace]:
    """Two processes' seats; nobody is let go for having waited long."""
    monkeypatch.setattr(pace, "LONGEST", 1e9)
    return [Pace(Path(file)) for _ in range(2)]


def steps(one: Pace, most: int = 10) -> int:
    """How many it may take now, of `most`."""
    return next((n for n in range(most) if not one.may_step()), most)


def test_nobody_is_more_than_a_step_ahead(seats):
    small, large = seats
    assert steps(small) == 10  # alone
    assert steps(large) == 1  # it starts where the other is
    assert steps(small) == 2 and steps(large) == 2 and steps(small) == 2


def test_nobody_waits_for_who_has_no_work(seats):
    small, large = seats
    assert steps(small, 3) == 3 and steps(large) == 1
    large.rest()
    assert steps(small, 500) == 500
    assert steps(large) == 1  # and not 500


def test_who_stands_still_is_not_waited_for_until_it_moves(seats, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace, "LONGEST", 0.05)
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    small, large = seats
    assert large.may_step() and steps(small) == 1
    now[0] = 0.04
    assert steps(small) == 0
    now[0] = 0.06
    assert steps(small, 500) == 500
    assert large.may_step()  # it is a step ahead of nobody: the other one gives up its lead
    assert steps(small) == 0 and steps(large) == 2 and steps(small) == 2


def test_a_process_joins_where_it_is_told_to(file):
    assert Pace.joined({}) is None and Pace.joined({PLACE: "/nowhere"}) is None
    assert [Pace.joined({PLACE: file})._own for _ in range(SEATS)] == list(range(SEATS))
    assert Pace.joined({PLACE: file}) is None


def test_a_driver_keeps_step(file, monkeypatch):
    monkeypatch.setenv(PLACE, file)
    other = Pace(Path(file))
    taken = []

    def step() -> bool:
        taken.append(len(taken))
        if len(taken) == 4:  # now the other one begins, and takes a step for every look at this one
            monkeypatch.setattr(driver.time, "sleep", lambda seconds: other.may_step())
            assert other.may_step()
        return len(taken) < 9

    async def drive() -> None:
        one = Driver(step, lambda: [asyncio.Future()], paced=True)
        one.wake()
        await one._task

    asyncio.run(drive())
    assert len(taken) == 9 and other._begun.tolist()[:2] == [8, 9]
    assert steps(other, 100) == 100  # it rests


def test_a_driver_rests_as_soon_as_nobody_waits(file, monkeypatch):
    monkeypatch.setenv(PLACE, file)
    other, rested = Pace(Path(file)), []

    def step() -> bool:
        asyncio.get_running_loop().call_soon(lambda: rested.append(not other._works[1]))  # such as an update
        return not rested

    async def drive() -> None:
        one = Driver(step, lambda: [], paced=True)
        one.wake()
        await one._task

    asyncio.run(drive())
    assert rested[0]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_vllms_engine_keeps_step(file, monkeypatch):
    pytest.importorskip("vllm")
    from test_engine_embedded import prompts_of, run
    from test_engine_vllm import engine_for
    from vllm_models import small_model

    monkeypatch.setenv(PLACE, file)
    other, engine = Pace(Path(file)), engine_for(small_model("llama"), seeded=False)
    run(engine, prompts_of([3, 5]), [Sampling(12, seed=1)] * 2)
    assert other._begun[1] >= engine.stats().steps > 0 and not other._works[1]
