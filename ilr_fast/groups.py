"""One step's questions as groups of dialogues: graded while others still talk, cut off or replaced where they teach
nothing.

A group whose rewards are all equal has no advantage, and without a KL or an entropy bonus no gradient. That is certain
when all its dialogues are graded, never before: one that still talks may differ. So

- `rollout.refill` (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2): when a group has turned out so, a fresh
  question is asked at once while the others go on, up to so many a step. The step learns from other questions; the
  gradient of those that count is what it would be.
- `rollout.stop_after_equal`: when a question's first so many samples have the same rewards, the others are cut off and
  the group does not count. That is a guess: of eight samples of which one is right, the first four mostly agree.

Which questions are asked and which count follows from the outcomes alone, not from who ends first: questions are asked
in the order given, one more for every group that fails, and the first samples are those of the lowest numbers. So a
step needs nothing from the steps before it (data.QuestionStream gives each its spare questions too).

    groups = gathered(questions, config.rollout, converse=…, score=…, live=…)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ilr_fast.config import RolloutConfig
from ilr_fast.types import Dialogue, Question, Scored

OnDone = Callable[[Dialogue], object]
Converse = Callable[[Question, OnDone], Coroutine[Any, Any, list[Dialogue]]]
Score = Callable[[Sequence[Dialogue]], list[Scored]]


@dataclass(frozen=True, slots=True)
class Groups:
    """A step's dialogues in the order of their questions; `scored` those that did not fail.

    `replaced`: questions in whose place others were asked; `stopped`: questions that were cut off. `behind`: seconds
    for which grading went on after the last dialogue had ended.
    """

    dialogues: list[Dialogue]
    scored: list[Scored]
    replaced: int
    stopped: int
    behind: float


@dataclass(frozen=True, slots=True)
class _Group:
    dialogues: list[Dialogue]
    scored: list[Scored]
    live: bool  # it has a gradient; not asked where no question could replace it
    stopped: bool = False


async def gather(
    questions: Sequence[Question],
    settings: RolloutConfig,
    *,
    converse: Converse,
    score: Score,
    live: Callable[[Sequence[Scored]], bool],
    inline: bool = False,
) -> Groups:
    """The groups of the first `settings.questions` questions, and of those after them that replace one.

    Args:
        questions: `settings.questions`, and `settings.refill` to spare.
        converse: all dialogues of one question, in order; it calls its second argument with each as it ends.
        score: grades dialogues, in order and without those that failed; called in a thread with all that have ended.
        live: whether a group's scored dialogues have a gradient; asked where there are questions to spare.
        inline: grade in this thread instead, so that when a question follows does not depend on the clock.
    """
    graders = _Graders(score, inline)
    try:
        return await _Step(settings, converse, graders, live).run(questions)
    finally:
        graders.close()


def gathered(*arguments: Any, **named: Any) -> Groups:
    """`gather` in an event loop of its own, whose main task gives no result: Python 3.11 makes a text of that."""
    found: list[Groups] = []

    async def main() -> None:
        found.append(await gather(*arguments, **named))

    asyncio.run(main())
    return found[0]


class _Graders:
    """Grades what has ended, in one thread, while the event loop goes on."""

    def __init__(self, score: Score, inline: bool):
        self._score, self._inline = score, inline
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="graders")
        self._waiting: list[tuple[Dialogue, asyncio.Future[list[Scored]]]] = []
        self._work: asyncio.Task[None] | None = None

    def score(self, dialogue: Dialogue) -> asyncio.Future[list[Scored]]:
        """The dialogue with its rewards, some time; empty where it failed."""
        future: asyncio.Future[list[Scored]] = asyncio.get_running_loop().create_future()
        if self._inline:
            try:
                future.set_result(self._score([dialogue]))
            except Exception as error:  # the grader's own: it goes to who waits
                future.set_exception(error)
            return future
        self._waiting.append((dialogue, future))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._grade())
        return future

    def close(self) -> None:
        """What is being graded is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _grade(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            dialogues = [dialogue for dialogue, _ in batch]
            try:
                scored = {id(s.dialogue): s for s in await loop.run_in_executor(self._thread, self._score, dialogues)}
            except Exception as error:  # the grader's own: it goes to who waits
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for dialogue, future in batch:
                if not future.done():
                    future.set_result([scored[id(dialogue)]] if id(dialogue) in scored else [])


class _Step:
    """The groups of one step."""

    def __init__(
        self, settings: RolloutConfig, converse: Converse, graders: _Graders, live: Callable[[Sequence[Scored]], bool]
    ):
        self.settings, self.converse, self.graders, self.live = settings, converse, graders, live
        self.ended = time.perf_counter()  # of the last dialogue

    async def run(self, questions: Sequence[Question]) -> Groups:
        spare = iter(questions)
        groups = [asyncio.create_task(self.group(next(spare))) for _ in range(self.settings.questions)]
        running = set(groups)
        try:
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                barren = [task for task in done if not task.result().live] if self.settings.refill else []
                for fresh in (next(spare, None) for _ in barren):
                    if fresh is not None:
                        groups.append(asyncio.create_task(self.group(fresh)))
                        running.add(groups[-1])
            return self.kept([task.result() for task in groups])
        finally:
            for task in groups:
                task.cancel()

    def kept(self, groups: Sequence[_Group]) -> Groups:
        """Without the first groups that have no gradient, one for each question that was asked in their place."""
        replaced = len(groups) - self.settings.questions
        left_out = [n for n, group in enumerate(groups) if not group.live][:replaced]
        kept = [group for n, group in enumerate(groups) if n not in left_out]
        return Groups(
            [dialogue for group in kept for dialogue in group.dialogues],
            [scored for group in kept for scored in group.scored],
            replaced,
            sum(group.stopped for group in groups),
            time.perf_counter() - self.ended,
        )

    async def group(self, question: Question) -> _Group:
        """All samples of a question, or the first ones where these agree."""
        first = range(self.settings.stop_after_equal or 0)
        ended: dict[int, Dialogue] = {}
        grading: dict[int, asyncio.Future[list[Scored]]] = {}

        def scored(sample: int) -> list[Scored] | None:
            future = grading.get(sample)
            known = future is not None and future.done() and not future.cancelled() and future.exception() is None
            return future.result() if future is not None and known else None

        def stop_if_they_agree(_: object) -> None:
            if _agree([scored(n) for n in first]):
                talking.cancel()

        def on_done(dialogue: Dialogue) -> None:
            self.ended = time.perf_counter()
            ended[dialogue.sample] = dialogue
            grading[dialogue.sample] = self.graders.score(dialogue)
            if first:
                grading[dialogue.sample].add_done_callback(stop_if_they_agree)

        talking = asyncio.create_task(self.converse(question, on_done))
        try:
            await asyncio.wait([talking])
            if not talking.cancelled():
                await asyncio.gather(talking, *grading.values())
            if _agree([scored(n) for n in first]):  # whether or not the others had ended by then
                return _Group([ended[n] for n in first], [one for n in first for one in scored(n) or ()], False, True)
            dialogues = talking.result()
            found = [one for dialogue in dialogues for one in grading[dialogue.sample].result()]
            return _Group(dialogues, found, not self.settings.refill or self.live(found))
        finally:
            talking.cancel()
            for future in grading.values():
                future.cancel()


def _agree(samples: Sequence[list[Scored] | None]) -> bool:
    """Whether there are samples, all graded, none failed, with the same rewards for every agent's every turn."""
    rewards = [one.rewards for found in samples for one in found or ()]
    return len(samples) > 0 and len(rewards) == len(samples) and all(r == rewards[0] for r in rewards)
