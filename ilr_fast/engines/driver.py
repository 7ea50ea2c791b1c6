"""The task that takes an engine's steps while requests wait for them.

It runs in the caller's event loop, gives it some passes between two steps, ends when there is nothing to do, and is
begun again by the next request. An error that ends it reaches everyone who waits, who would wait for ever otherwise.
Meanwhile garbage is looked for among young objects alone: to go through all takes longer than a step.

    driver = Driver(step, lambda: [request.future for request in requests])
    driver.wake()               # at every request
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from ilr_fast.engines.pace import AHEAD, Pace

# Passes of the event loop between two steps: enough for a finished turn to reach its peers and come back as requests.
PASSES_BETWEEN_STEPS = 12
HELD = 5e-5  # seconds between two looks at who is held back (pace.py)
LATER = 2**30  # collections of middle-aged objects before one of all

_driven: set[Driver] = set()
_thresholds: list[tuple[int, int, int]] = []  # as they were before the first began


class Driver:
    """`step` takes a step and says whether there may be more to do; `waiting` are the futures that steps answer.

    `paced`: it keeps step with the other paced engines of this process, and with those of other processes where this
    one was started so (pace.py). What runs at the same time then depends on the clock.
    """

    def __init__(
        self,
        step: Callable[[], bool | Awaitable[bool]],
        waiting: Callable[[], Iterable[asyncio.Future[Any]]],
        paced: bool = False,
    ):
        self._step, self._waiting, self._paced = step, waiting, paced
        self._pace = Pace.joined(os.environ) if paced else None
        self._begun = 0  # steps
        self._task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """There is something to do."""
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            self._task = loop.create_task(self._drive())
            self._task.add_done_callback(_heard)

    def others(self) -> list[Driver]:
        """The engines of this process that it keeps step with and that have work."""
        return [one for one in _driven if one is not self and one._paced] if self._paced else []

    async def _drive(self) -> None:
        self._begun = min((one._begun for one in self.others()), default=0)
        with _no_whole_collection(self):
            try:
                while True:
                    for _ in range(PASSES_BETWEEN_STEPS):
                        await asyncio.sleep(0)
                    await self._turn()
                    goes_on = self._step()
                    if not (goes_on if isinstance(goes_on, bool) else await goes_on):
                        return
                    if self._pace is not None and not list(self._waiting()):  # the next pass may bring an update
                        self._pace.rest()
            except Exception as error:
                for future in list(self._waiting()):
                    if not future.done():
                        future.set_exception(error)
            finally:
                if self._pace is not None:
                    self._pace.rest()

    async def _turn(self) -> None:
        """Waits until this engine is not ahead of the others."""
        while any(one._begun + AHEAD <= self._begun for one in self.others()):
            await asyncio.sleep(0)
        self._begun += 1
        while self._pace is not None and not self._pace.may_step():
            time.sleep(HELD)
            await asyncio.sleep(0)


@contextlib.contextmanager
def _no_whole_collection(driver: Driver) -> Iterator[None]:
    """Garbage collections of all objects wait for the end of the last driver."""
    if not _driven:
        _thresholds[:] = [gc.get_threshold()]
        gc.set_threshold(*_thresholds[0][:2], LATER)
    _driven.add(driver)
    try:
        yield
    finally:
        _driven.discard(driver)
        if not _driven:
            gc.set_threshold(*_thresholds[0])


def _heard(task: asyncio.Task[None]) -> None:
    """An interruption goes its own way: asyncio need not print that nobody asked this task for it."""
    if not task.cancelled():
        task.exception()
