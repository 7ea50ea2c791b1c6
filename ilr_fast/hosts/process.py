"""An agent in a process of its own (worker.py): its own interpreter and CUDA context, its own log, its own death.

    crew: list[Link] = []
    hosts = [ProcessHost(name, config, Path("runs/mine/logs"), crew) for name in config.agents]
    for host in hosts:
        host.open()                 # they load together
    wait_until_ready(hosts)

Requests of one pass of the event loop go in one message, and are in the worker's engine before its next step. With
`deterministic` the host takes the engine's steps in the same places of the event loop as an engine in this process
would: dialogues and weights are those of local hosts, bit for bit, and agents generate by turns, step after step.
Without it they generate at the same time; updates overlap either way.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from typing import Any

from ilr_fast.config import Config
from ilr_fast.config_parse import to_tree
from ilr_fast.engines.driver import Driver
from ilr_fast.hosts import messages
from ilr_fast.hosts.link import Link
from ilr_fast.types import Generation, Residence, Sampling, StepResult, TrainingSequence


class ProcessHost:
    """A `Host` (hosts/__init__.py) whose process starts; `open` and `wait_until_ready` must follow.

    Its log is `logs`/NAME.log; `environment` is added to this process's.
    """

    max_context: int

    def __init__(
        self, name: str, config: Config, logs: Path, crew: list[Link], environment: Mapping[str, str] | None = None
    ):
        self.name, self.trains, self._config = name, config.agents[name].train != "none", config
        self._lockstep = config.deterministic
        self._link = Link(name, "ilr_fast.hosts.worker", logs / f"{name}.log", crew, config.hang_limit, environment)
        self._outgoing: list[list[Any]] = []
        self._keys = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}  # in lockstep: those that a step may answer
        self._driver = Driver(self._take_step, lambda: self._waiting.values())

    def open(self) -> None:
        """The agent starts to load."""
        self._opened = self._link.ask("open", name=self.name, config=to_tree(self._config))

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._link.pid

    async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Samples with the current weights. HostLost where the worker ends before it answers."""
        ask = self._stepwise if self._lockstep else self._freely
        return messages.to_generation(await ask(list(tokens), messages.from_sampling(sampling)))

    def start_update(
        self, sequences: Sequence[TrainingSequence], step: int, beside: bool = False
    ) -> Callable[[], StepResult]:
        """See Host. The worker begins at once."""
        asked = self._link.ask("update", sequences=messages.from_sequences(sequences), step=step, beside=beside)
        if not beside:
            return lambda: messages.to_result(asked.result())

        def learned() -> StepResult:
            asked.result()  # it has begun
            return messages.to_result(self._link.ask("learned").result())

        return learned

    def update(self, sequences: Sequence[TrainingSequence], step: int) -> StepResult:
        """See Host."""
        return self.start_update(sequences, step)()

    def reference_logps(self, sequences: Sequence[TrainingSequence]) -> list[tuple[float, ...]]:
        """See Host."""
        found = self._link.ask("reference_logps", sequences=messages.from_sequences(sequences)).result()
        return [tuple(logps) for logps in found]

    def hold(self) -> bool:
        """See Host. The step waits for the files of agents in processes."""
        return False

    def save_model(self, folder: Path) -> None:
        """See Host."""
        self._link.ask("save_model", folder=str(folder)).result()

    def save_state(self, folder: Path) -> None:
        """See Host."""
        self._link.ask("save_state", folder=str(folder)).result()

    def load(self, model_folder: Path, state_folder: Path) -> None:
        """See Host."""
        self._link.ask("load", model_folder=str(model_folder), state_folder=str(state_folder)).result()

    def forget(self) -> None:
        """See Host."""
        self._link.ask("forget").result()

    def reside(self, residence: Residence) -> None:
        """See Host."""
        self._link.ask("reside", residence=residence).result()

    def stats(self) -> dict[str, float]:
        """See Host. On the CPU the memory is the worker's."""
        return self._link.ask("stats").result()

    def close(self) -> None:
        """Ends the worker, whatever it does."""
        self._link.close()

    async def _freely(self, tokens: list[int], sampling: list[Any]) -> Any:
        """The generation as JSON, as soon as the worker has it."""
        key, future = self._link.expect()
        request = [key, tokens, sampling]
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.append(request)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if request in self._outgoing:
                self._outgoing.remove(request)
            else:
                self._link.post({"call": "cancel", "arguments": {"keys": [key]}})
            raise

    def _flush(self) -> None:
        requests, self._outgoing = self._outgoing, []
        if requests:
            self._link.post({"call": "generate", "arguments": {"requests": requests}})

    async def _stepwise(self, tokens: list[int], sampling: list[Any]) -> Any:
        """The generation as JSON, after a step of the engine that is taken here."""
        loop = asyncio.get_running_loop()
        key, future = next(self._keys), loop.create_future()
        self._waiting[key] = future
        self._outgoing.append([key, tokens, sampling])
        self._driver.wake()
        return await future

    def _take_step(self) -> bool:
        """A step of the worker's engine, where there is work; whether there was.

        Waits here, not in the event loop: what else happens in it must not depend on how long a step takes.
        """
        cancelled = [key for key, future in self._waiting.items() if future.done()]
        for key in cancelled:
            del self._waiting[key]
        if not self._waiting and not cancelled:
            return False
        requests, self._outgoing = self._outgoing, []
        for key, generation in self._link.ask("advance", requests=requests, cancelled=cancelled).result():
            future = self._waiting.pop(key, None)
            if future is not None and not future.done():
                future.set_result(generation)
        return True


def wait_until_ready(hosts: Collection[ProcessHost], on_done: Callable[[], object]) -> None:
    """Waits until every agent is loaded, and calls `on_done` for each; raises as soon as one can't be."""
    opened = [host._opened for host in hosts]
    for future in opened:
        future.add_done_callback(lambda _: on_done())
    for future in wait(opened, return_when=FIRST_EXCEPTION).done:
        future.result()
    for host in hosts:
        host.max_context = host._opened.result()["max_context"]
