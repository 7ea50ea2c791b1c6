"""Runs dialogues as coroutines: an agent's next turn starts as soon as the peers' turns that it needs are there.

    dialogues = asyncio.run(run_dialogues(jobs, protocol, seats, config.rollout))

There is no barrier between stages, and nothing depends on who finishes first: results come in the order of the jobs, a
request's seed is a hash of what it is for, and a view holds the turns that its stage waited for and no others. Nothing
random is kept between calls, so that a run can be resumed from the step's number alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ilr_fast.chat import ChatFormat
from ilr_fast.config import RolloutConfig, turn_limit
from ilr_fast.context import check_context, longest_prompt_tokens
from ilr_fast.hosts import Host
from ilr_fast.protocols.base import DialogueProtocol, View
from ilr_fast.quoting import quote
from ilr_fast.types import Dialogue, Engine, Interaction, Message, Question, Sampling, Turn

__all__ = ["DialogueJob", "Seat", "check_context", "longest_prompt_tokens", "request_seed", "run_dialogues"]

Heard = dict[str, dict[str, str]]  # by peer and stage, the quoted texts that an agent has waited for


@dataclass(frozen=True, slots=True)
class Seat:
    """An agent at the table: what generates for it, and how its conversation is written."""

    engine: Engine | Host
    chat: ChatFormat


@dataclass(frozen=True, slots=True)
class DialogueJob:
    """The `sample`-th dialogue about a question. `interactions` by agent (neutral where missing); `seed` of the run."""

    question: Question
    sample: int
    interactions: Mapping[str, Interaction]
    seed: int


def request_seed(seed: int, *what: object) -> int:
    """A seed in [0, 2^63) for one request, from the run's seed and what the request is for."""
    digest = hashlib.blake2b("\0".join(map(str, (seed, *what))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


async def run_dialogues(
    jobs: Sequence[DialogueJob],
    protocol: DialogueProtocol,
    seats: Mapping[str, Seat],
    settings: RolloutConfig,
    *,
    examples: Sequence[Message] = (),
    temperature: float | None = None,
    on_done: Callable[[Dialogue], object] | None = None,
    in_flight: int | None = None,
) -> list[Dialogue]:
    """The dialogues of the jobs, in the jobs' order.

    `examples`: messages shown before the first one (a system message, worked examples). `temperature` replaces that of
    the settings (0: greedy). `on_done` is called with each dialogue as it ends, in no fixed order. At most `in_flight`
    dialogues (None: all) are held at a time; they start in the jobs' order. A request that fails or does not fit the
    context gives that dialogue an `error`; an exception of the protocol itself ends the call.
    """
    gate = asyncio.Semaphore(in_flight or max(1, len(jobs)))

    async def run(job: DialogueJob) -> Dialogue:
        async with gate:
            dialogue = await _Discussion(job, protocol, seats, settings, examples, temperature).run()
        if on_done is not None:
            on_done(dialogue)
        return dialogue

    return await _all(run(job) for job in jobs)


class _Discussion:
    """One dialogue: a coroutine for each agent, and a future for each turn that others may wait for."""

    def __init__(
        self,
        job: DialogueJob,
        protocol: DialogueProtocol,
        seats: Mapping[str, Seat],
        settings: RolloutConfig,
        examples: Sequence[Message],
        temperature: float | None,
    ):
        self.job, self.protocol, self.seats, self.settings = job, protocol, seats, settings
        self.examples = examples
        self.temperature = settings.temperature if temperature is None else temperature
        self.turns: dict[str, list[Turn]] = {name: [] for name in seats}
        self.errors: dict[str, str] = {}
        loop = asyncio.get_running_loop()
        self.said: dict[tuple[str, str], asyncio.Future[Turn | None]] = {
            (name, stage): loop.create_future() for name in seats for stage in protocol.stages
        }

    async def run(self) -> Dialogue:
        await _all(self._speak(name) for name in self.seats)
        error = next((f"{name}, {self.errors[name]}" for name in self.seats if name in self.errors), None)
        turns = {name: tuple(turns) for name, turns in self.turns.items()}
        return Dialogue(self.job.question, self.job.sample, self.protocol.name, turns, error)

    async def _speak(self, name: str) -> None:
        """One agent's turns, until the end or until something fails; its peers then learn that nothing more comes."""
        tokens: list[int] = []
        heard: Heard = {peer: {} for peer in self.seats if peer != name}
        try:
            for stage in self.protocol.stages:
                if not await self._hear(name, stage, heard):
                    return
                turn = await self._turn(name, stage, heard, tokens)
                if turn is None:
                    return
                tokens += [*turn.prompt_tokens, *turn.generation.tokens]
                self.turns[name].append(turn)
                self.said[name, stage].set_result(turn)
        finally:
            for stage in self.protocol.stages:
                if not self.said[name, stage].done():
                    self.said[name, stage].set_result(None)

    async def _hear(self, name: str, stage: str, heard: Heard) -> bool:
        """Waits for the peers' turns that the stage needs; False where one of them will not come."""
        for peer, texts in heard.items():
            for needed in self.protocol.needs(stage):
                turn = await self.said[peer, needed]
                if turn is None:
                    return False
                texts[needed] = self._quoted(name, turn)
        return True

    async def _turn(self, name: str, stage: str, heard: Heard, tokens: list[int]) -> Turn | None:
        seat = self.seats[name]
        interaction = self.job.interactions.get(name, "neutral")
        own = {turn.stage: self._quoted(name, turn) for turn in self.turns[name]}
        view = View(self.job.question, interaction, own, tuple(dict(texts) for texts in heard.values()))
        message = self.protocol.message(stage, view)
        prompt = self._prompt(name, message)
        room = seat.engine.max_context - len(tokens) - len(prompt)
        if room < 1:
            length, limit = len(tokens) + len(prompt), seat.engine.max_context
            self.errors[name] = f"{stage}: a prompt of {length} tokens leaves no room in a context of {limit}"
            return None
        generation = await seat.engine.generate([*tokens, *prompt], self._sampling(name, stage, room))
        if generation.finish == "error":
            self.errors[name] = f"{stage}: {generation.error or 'the engine failed'}"
            return None
        return Turn(stage, interaction, message, tuple(prompt), generation)

    def _prompt(self, name: str, message: str) -> list[int]:
        """What is appended to the agent's conversation before its turn."""
        chat, turns = self.seats[name].chat, self.turns[name]
        if not turns:
            return chat.first([*self.examples, Message("user", message)])
        return chat.follow(message, turns[-1].generation.finish, turns[-1].generation.tokens)

    def _sampling(self, name: str, stage: str, room: int) -> Sampling:
        settings, job = self.settings, self.job
        return Sampling(
            max_tokens=min(turn_limit(settings, stage), room),
            temperature=self.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            stop=tuple(dict.fromkeys((*self.seats[name].chat.stop_strings, *settings.stop))),
            seed=request_seed(job.seed, job.question.id, job.sample, name, stage),
            turn=len(self.turns[name]),
        )

    def _quoted(self, reader: str, turn: Turn) -> str:
        """A turn's text as the reader sees it: its end, by the reader's tokenizer, whose context must hold it."""
        return quote(self.seats[reader].chat.tail(turn.generation.text, self.settings.peer_tokens))


async def _all(coroutines) -> list:  # type: ignore[no-untyped-def]
    """Their results in order; where one raises, the others are cancelled and its exception goes on."""
    coroutines = list(coroutines)
    if len(coroutines) == 1:  # the lone agent of a dialogue needs no task of its own
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
