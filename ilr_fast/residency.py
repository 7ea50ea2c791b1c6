"""Which agent holds what of a device's memory, and when: decided here, for the whole run.

Agents of one device are wrapped (`Resident`), so that whatever the run asks of one finds its memory there. What each
of them holds follows from its `engine.sleep` and from what is asked of whom:

    asked                   `never`   `cache`                      `turns`: the one asked        `turns`: the others
    to generate             awake     awake                        awake                         away
    to learn (or to give    awake     without keys and values      without keys and values       away
    a reference's log-probs)
    for its weights         awake     as it is                     its weights at the least      away

Keys and values go before the first update of a step, all agents' at once, and come back with the next request: then one
agent's update has the memory that the others' caches took. Nothing is copied for that.

Agents that take turns are resident one at a time. Requests to those that are away wait. The resident one goes on until
none of its requests runs and none has come for some passes of the event loop: a swap copies all weights there and back,
and costs as much for one turn as for a thousand; until then whatever it samples was due anyway, and every peer that
waits has the more to do at once. Next comes the one with the most queued tokens (prompt and limit). Of a step's updates
that of the resident agent comes first. What is sampled does not change where every request has a seed of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from ilr_fast.config import Config
from ilr_fast.hosts import Host
from ilr_fast.metrics import Timer
from ilr_fast.types import Generation, Residence, Sampling, StepResult, TrainingSequence

Sleep = Literal["never", "cache", "turns"]
Need = Literal["generate", "learn", "weights"]
# Enough for a finished turn to reach its peers and come back as a request, from a process of its own too.
PASSES = 24
_MORE: dict[Residence, int] = {"away": 0, "training": 1, "awake": 2}


def by_device(config: Config) -> dict[str, list[str]]:
    """The agents of each device, by its name."""
    found: dict[str, list[str]] = {}
    for name, agent in config.agents.items():
        device = {"auto": "cuda:0", "cuda": "cuda:0"}.get(agent.device, agent.device)
        found.setdefault(device, []).append(name)
    return found


def leaving(config: Config) -> set[str]:
    """Of the agents that take turns on a device all but the last: each makes room as soon as it is loaded."""
    turns = ([n for n in names if config.agents[n].engine.rests == "turns"] for names in by_device(config).values())
    return {name for names in turns for name in names[:-1]}


class Residency:
    """The scheduler of one device's agents. `hosts` are awake; `away`: those that are not, when it begins."""

    def __init__(self, hosts: Mapping[str, Host], sleep: Mapping[str, Sleep], away: Sequence[str] = ()):
        self.hosts, self.sleep = hosts, sleep
        self.timer: Timer | None = None  # a step's, whose phase `swap` the moves are
        self.swaps = 0  # how often another agent became resident
        self._now: dict[str, Residence] = {name: "away" if name in away else "awake" for name in hosts}
        self._queues: dict[str, dict[asyncio.Future[None], int]] = {name: {} for name in hosts}
        self._running = dict.fromkeys(hosts, 0)
        self._mover: asyncio.Task[None] | None = None
        self._ended: asyncio.Event | None = None  # set when the last request of the resident agent has ended
        self._updates: dict[str, tuple[Sequence[TrainingSequence], int]] = {}
        self._results: dict[str, StepResult] = {}

    def residents(self) -> dict[str, Host]:
        """The hosts as the run should use them."""
        return {name: Resident(name, self) for name in self.hosts}

    @property
    def resident(self) -> str | None:
        """Of the agents that take turns the one that is there."""
        return next((n for n, now in self._now.items() if self.sleep[n] == "turns" and now != "away"), None)

    def arrange(self, name: str, need: Need) -> None:
        """Moves memory until every agent has what the table above gives it, where agent `name` is asked."""
        wanted = {other: self._wanted(other, name, need) for other in self.hosts}
        if wanted == self._now:
            return
        with self._swapping():
            for other, goal in wanted.items():  # what goes makes room for what comes
                now = self._now[other]
                least = min(now, goal, key=_MORE.__getitem__)
                if least == "training" or least != now:  # an agent that has learned gives back what torch keeps
                    self.move(other, least)
            for other, goal in wanted.items():
                if goal != self._now[other]:
                    self.move(other, goal)

    async def generate(self, name: str, tokens: Sequence[int], sampling: Sampling) -> Generation:
        """A generation, once the agent is awake."""
        if self.sleep[name] != "turns":
            self.arrange(name, "generate")
        elif self._now[name] != "awake":
            await self._wait(name, len(tokens) + sampling.max_tokens)
        self._running[name] += 1
        try:
            return await self.hosts[name].generate(tokens, sampling)
        finally:
            self._running[name] -= 1
            if self._ended is not None and not self._at_work():
                self._ended.set()

    def start_update(self, name: str, sequences: Sequence[TrainingSequence], step: int) -> Callable[[], StepResult]:
        """See Host. Updates of agents that take turns wait until a result is asked for, and then run one by one."""
        if self.sleep[name] != "turns":
            self.arrange(name, "learn")
            return self.hosts[name].start_update(sequences, step)
        self._updates[name] = sequences, step
        return lambda: self._updated(name)

    def move(self, name: str, residence: Residence) -> None:
        """Moves one agent's memory, whatever the others hold."""
        self.swaps += self._now[name] == "away" and residence != "away"
        self.hosts[name].reside(residence)
        self._now[name] = residence

    def _wanted(self, other: str, name: str, need: Need) -> Residence:
        """What `other` should hold where `need` is asked of `name`."""
        now, sleep = self._now[other], self.sleep[other]
        if sleep == "never":
            return "awake"
        if sleep == "turns" and other != name:
            if self.sleep[name] == "turns":
                return "away"
            return "training" if need == "learn" and now == "awake" else now
        if need == "weights":
            return now if now != "away" else "training"
        return "awake" if need == "generate" else "training"

    def _at_work(self) -> bool:
        """Whether requests run of agents that take turns."""
        return any(self._running[name] for name in self.hosts if self.sleep[name] == "turns")

    @contextlib.contextmanager
    def _swapping(self) -> Iterator[None]:
        with self.timer("swap") if self.timer is not None else contextlib.nullcontext():
            yield

    async def _wait(self, name: str, tokens: int) -> None:
        """Queues a request of `tokens` tokens until its agent is awake."""
        loop = asyncio.get_running_loop()
        if self._mover is None or self._mover.done() or self._mover.get_loop() is not loop:
            self._ended = asyncio.Event()
            self._mover = loop.create_task(self._take_turns(self._ended))
        turn = loop.create_future()
        self._queues[name][turn] = tokens
        try:
            await turn
        finally:
            self._queues[name].pop(turn, None)

    async def _take_turns(self, ended: asyncio.Event) -> None:
        """While requests wait: lets the resident agent finish, and brings the one with the most to do."""
        try:
            while any(self._queues.values()):
                await self._finished(ended)
                name = max(self._queues, key=lambda n: sum(self._queues[n].values()))
                if self._queues[name]:
                    self.arrange(name, "generate")
                self._answer(self._queues[name], None)
        except Exception as error:  # no memory, or a worker that has ended: those who wait are told
            for queue in self._queues.values():
                self._answer(queue, error)

    def _answer(self, queue: Mapping[asyncio.Future[None], int], error: Exception | None) -> None:
        for turn in queue:
            if not turn.done():
                if error is None:
                    turn.set_result(None)
                else:
                    turn.set_exception(error)

    async def _finished(self, ended: asyncio.Event) -> None:
        """Waits until the resident agent has nothing that runs, and nothing comes for it for some passes."""
        quiet = 0
        while quiet < PASSES:
            await asyncio.sleep(0)
            quiet += 1
            if self._at_work():
                ended.clear()
                await ended.wait()
                quiet = 0

    def _updated(self, name: str) -> StepResult:
        """The result of an update; with the first that is asked for all run, the resident agent's before the others."""
        for other in sorted(self._updates, key=lambda n: n != self.resident):
            sequences, step = self._updates.pop(other)
            self.arrange(other, "learn")
            self._results[other] = self.hosts[other].update(sequences, step)
        return self._results.pop(name)


class Resident:
    """A `Host` (hosts/__init__.py) whose memory is there when it is needed."""

    def __init__(self, name: str, residency: Residency):
        self._host, self._residency = residency.hosts[name], residency
        self.name, self.trains, self.max_context = name, self._host.trains, self._host.max_context

    @property
    def inner(self) -> Host:
        """The host itself."""
        return self._host

    async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Generation:
        """See Host."""
        return await self._residency.generate(self.name, tokens, sampling)

    def start_update(
        self, sequences: Sequence[TrainingSequence], step: int, beside: bool = False
    ) -> Callable[[], StepResult]:
        """See Host."""
        assert not beside, "an agent that gives memory back does not generate while it learns"
        return self._residency.start_update(self.name, sequences, step)

    def update(self, sequences: Sequence[TrainingSequence], step: int) -> StepResult:
        """See Host."""
        return self.start_update(sequences, step)()

    def reference_logps(self, sequences: Sequence[TrainingSequence]) -> list[tuple[float, ...]]:
        """See Host."""
        self._residency.arrange(self.name, "learn")
        return self._host.reference_logps(sequences)

    def hold(self) -> bool:
        """See Host. The step waits for the files of agents that take turns."""
        if self._residency.sleep[self.name] == "turns":
            return False
        return self._host.hold()

    def _with_weights(self) -> None:
        """Agents that take turns have their weights back; those of others stay, and updates go on beside the files."""
        if self._residency.sleep[self.name] == "turns":
            self._residency.arrange(self.name, "weights")

    def save_model(self, folder: Path) -> None:
        """See Host."""
        self._with_weights()
        self._host.save_model(folder)

    def save_state(self, folder: Path) -> None:
        """See Host."""
        self._with_weights()
        self._host.save_state(folder)

    def load(self, model_folder: Path, state_folder: Path) -> None:
        """See Host."""
        self._residency.arrange(self.name, "weights")
        self._host.load(model_folder, state_folder)

    def forget(self) -> None:
        """See Host."""
        self._host.forget()

    def reside(self, residence: Residence) -> None:
        """See Host."""
        self._residency.move(self.name, residence)

    def stats(self) -> dict[str, float]:
        """See Host."""
        return self._host.stats()

    def close(self) -> None:
        """See Host."""
        self._host.close()
