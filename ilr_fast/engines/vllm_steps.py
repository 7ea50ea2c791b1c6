"""Steps of vLLM's core: begun, and their results taken.

On a GPU two steps are under way at a time: one is scheduled and launched while the one before it is computed. vLLM's
own step launches one and then waits for the one before; here the host has something else to do in that time.

    outputs = steps.step(meanwhile)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Steps:
    """Of vLLM's in-process `client`; `stream` None: torch's current one."""

    client: Any
    stream: torch.cuda.Stream | None = None

    def step(self, meanwhile: Callable[[], bool] = lambda: False) -> list[Any]:
        """What vLLM's next finished step gave its requests; on a GPU a step more is then under way.

        `meanwhile` is called until the results are there or it says that it has nothing more to do.
        """
        if self.client.engine_core.batch_queue is None:
            return list(self.client.get_output().outputs)
        given = self._begin()
        if self._filling():
            return given
        while not self._ready() and meanwhile():
            pass
        return given + self._take()

    async def step_beside(self, meanwhile: Callable[[], bool]) -> list[Any]:
        """`step`, the results awaited in the event loop: other engines' steps are begun and taken meanwhile."""
        core = self.client.engine_core
        if core.batch_queue is None:
            return self.step()
        given = self._begin()
        if self._filling():
            return given
        while core.batch_queue and not self._ready():  # it may be drained meanwhile
            if not meanwhile():
                await asyncio.sleep(0)
        return given + (self._take() if core.batch_queue else [])

    def drain(self) -> list[Any]:
        """What the steps that are under way gave their requests; none is begun."""
        found = []
        while self.client.engine_core.batch_queue:
            found += self._take()
        return found

    def tokens_held(self) -> int:
        """Tokens that were sampled and that no step has given their requests yet."""
        return int(getattr(self.client.engine_core.scheduler, "held", 0))

    def _begin(self) -> list[Any]:
        """Begins a step if there is something to compute, and waits for none, so that it gives nothing yet.

        Where nothing is left to compute but what has ended is told to the workers, vLLM waits for a step after all.
        """
        core = self.client.engine_core
        given = []
        while len(core.batch_queue) >= core.batch_queue_size:  # the wait for its results was cut off
            given += self._take()
        if not core.scheduler.has_requests():
            return given
        core.batch_queue_size += 1  # vLLM waits as soon as its queue is full
        try:
            with torch.cuda.stream(self.stream):  # None changes nothing
                outputs, _ = core.step_with_batch_queue()
        finally:
            core.batch_queue_size -= 1
        return given + _of_all_clients(outputs or {})

    def _filling(self) -> bool:
        """Whether nothing is taken yet, because a second step can be begun."""
        core = self.client.engine_core
        queued = len(core.batch_queue)
        return not queued or (queued < core.batch_queue_size and core.scheduler.has_requests())

    def _ready(self) -> bool:
        """Whether the oldest step's results are there."""
        output = getattr(self.client.engine_core.batch_queue[-1][0], "async_output", None)
        return output is None or bool(output.copy_event.query())

    def _take(self) -> list[Any]:
        """What the oldest step under way gave its requests."""
        core = self.client.engine_core
        future, scheduled, begun = core.batch_queue.pop()
        with torch.cuda.stream(self.stream):
            results = future.result()
            if results is None:
                begun.result()  # raises what kept the step from being sampled
            return _of_all_clients(core.scheduler.update_from_output(scheduled, results))


def _of_all_clients(outputs: Mapping[int, Any]) -> list[Any]:
    return [output for client in outputs.values() for output in client.outputs]
