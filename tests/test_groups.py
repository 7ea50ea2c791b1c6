"""A step's groups: graded as dialogues end, replaced or cut off where they teach nothing, whoever ends first."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from ilr_fast.config import RolloutConfig
from ilr_fast.groups import Groups, gather
from ilr_fast.types import Dialogue, Generation, Grade, Question, Scored, Turn

QUESTIONS = [Question(f"q{n}", "?", "1") for n in range(12)]


def talk(rewards: dict[str, list[float]], delay=lambda q, k: 0.0):
    """Dialogues that say which reward they get; a reward of −1 is a dialogue that fails. Keeps who was cut off."""
    cut: list[tuple[str, int]] = []

    async def converse(question, on_done):
        async def one(sample: int) -> Dialogue:
            try:
                await asyncio.sleep(delay(question.id, sample))
            except asyncio.CancelledError:
                cut.append((question.id, sample))
                raise
            reward = rewards[question.id][sample]
            turn = Turn("single", "neutral", "", (1,), Generation((1,), (-1.0,), "stop", str(reward)))
            done = Dialogue(question, sample, "single", {"a": (turn,)}, "failed" if reward < 0 else None)
            on_done(done)
            return done

        tasks = [asyncio.ensure_future(one(k)) for k in range(len(rewards[question.id]))]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    return converse, cut


def score(dialogues):
    values = {id(d): float(d.turns["a"][0].generation.text) for d in dialogues if d.error is None}
    return [
        Scored(d, {"a": (Grade(values[id(d)], False, False, None),)}, {"a": (values[id(d)],)})
        for d in dialogues
        if d.error is None
    ]


def live(scored) -> bool:
    return len({s.rewards["a"] for s in scored}) > 1


def run(rewards, *, delay=lambda q, k: 0.0, asked=QUESTIONS, **settings) -> tuple[Groups, list[tuple[str, int]]]:
    converse, cut = talk(rewards, delay)
    inline = settings.pop("inline", False)
    config = RolloutConfig(questions=3, samples=4, **settings)
    groups = gather(asked, config, converse=converse, score=score, live=live, inline=inline)
    return asyncio.run(groups), cut


def told(groups: Groups) -> list[tuple[str, int]]:
    return [(d.question.id, d.sample) for d in groups.dialogues]


def every(*questions: str, samples: int = 4) -> list[tuple[str, int]]:
    return [(q, k) for q in questions for k in range(samples)]


MIXED, EQUAL, FAILED = [0.0, 1.0, 1.0, 0.0], [1.0] * 4, [0.0, -1.0, 1.0, 0.0]


@pytest.mark.parametrize("inline", [False, True])
def test_without_refill_all_questions_count_whatever_their_rewards(inline: bool) -> None:
    groups, _ = run({"q0": MIXED, "q1": EQUAL, "q2": FAILED}, inline=inline)
    assert told(groups) == every("q0", "q1", "q2")
    assert [(s.dialogue.question.id, s.dialogue.sample) for s in groups.scored] == [
        *every("q0", "q1"), ("q2", 0), ("q2", 2), ("q2", 3),
    ]  # fmt: skip
    assert groups.replaced == groups.stopped == 0


def test_a_group_without_a_gradient_is_replaced_by_the_next_question() -> None:
    rewards = {"q0": EQUAL, "q1": MIXED, "q2": EQUAL, "q3": EQUAL, "q4": MIXED, "q5": MIXED, "q6": MIXED}
    groups, _ = run(rewards, refill=5)
    assert told(groups) == every("q1", "q4", "q5") and groups.replaced == 3


def test_the_bound_leaves_groups_without_a_gradient_in_the_step() -> None:
    groups, _ = run({q.id: EQUAL for q in QUESTIONS}, refill=2, asked=QUESTIONS[:5])
    assert told(groups) == every("q2", "q3", "q4") and groups.replaced == 2


def test_what_counts_does_not_depend_on_who_is_first() -> None:
    draw = random.Random(3)
    rewards = {q.id: draw.choice([MIXED, EQUAL, EQUAL, FAILED]) for q in QUESTIONS}
    for settings in ({"refill": 9}, {"refill": 9, "stop_after_equal": 2}, {"stop_after_equal": 3}):
        expected = run(rewards, inline=True, **settings)[0]
        for seed in range(5):
            g = random.Random(seed)
            found = run(rewards, delay=lambda q, k, g=g: g.random() / 300, inline=seed % 2 == 0, **settings)[0]
            assert told(found) == told(expected) and found.replaced == expected.replaced
            assert found.stopped == expected.stopped


def test_a_question_whose_first_samples_agree_is_cut_off() -> None:
    slow = lambda q, k: 30.0 if q == "q1" and k > 1 else 0.0  # noqa: E731
    groups, cut = run({"q0": MIXED, "q1": [0.0, 0.0, 1.0, 1.0], "q2": MIXED}, delay=slow, stop_after_equal=2)
    assert told(groups) == [*every("q0"), ("q1", 0), ("q1", 1), *every("q2")] and groups.stopped == 1
    assert sorted(cut) == [("q1", 2), ("q1", 3)]


def test_failed_samples_do_not_agree() -> None:
    groups, cut = run({"q0": [0.0, -1.0, 0.0, 1.0], "q1": MIXED, "q2": MIXED}, stop_after_equal=3)
    assert groups.stopped == 0 and not cut and told(groups) == every("q0", "q1", "q2")


def test_dialogues_are_graded_while_others_talk() -> None:
    graded = threading.Event()

    def grade(dialogues):
        if any(d.question.id == "q0" for d in dialogues):
            graded.set()
        return score(dialogues)

    async def main() -> Groups:
        converse, _ = talk({q.id: MIXED for q in QUESTIONS})

        async def waits(question, on_done):
            while question.id != "q0" and not graded.is_set():
                await asyncio.sleep(0.001)
            return await converse(question, on_done)

        config = RolloutConfig(questions=3, samples=4)
        return await asyncio.wait_for(gather(QUESTIONS, config, converse=waits, score=grade, live=live), 20)

    assert told(asyncio.run(main())) == every("q0", "q1", "q2")


@pytest.mark.parametrize("inline", [False, True])
def test_what_a_grader_raises_ends_the_step(inline: bool) -> None:
    def broken(dialogues):
        raise ZeroDivisionError("the grader's own")

    converse, _ = talk({q.id: MIXED for q in QUESTIONS})
    config = RolloutConfig(questions=3, samples=4)
    with pytest.raises(ZeroDivisionError, match="own"):
        asyncio.run(gather(QUESTIONS, config, converse=converse, score=broken, live=live, inline=inline))
