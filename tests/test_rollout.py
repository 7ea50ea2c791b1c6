"""Rollouts over a fake engine that answers in its own order: no barrier, and results that don't depend on it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from chat_cases import byte_level

from ilr_fast.chat import ChatFormat
from ilr_fast.config import AgentConfig, Config, EngineConfig, PromptConfig, RewardConfig, RolloutConfig
from ilr_fast.errors import UserError
from ilr_fast.protocols import load_protocol
from ilr_fast.rollout import DialogueJob, Seat, check_context, longest_prompt_tokens, request_seed, run_dialogues
from ilr_fast.types import Generation, Message, Question

CHAT = ChatFormat(byte_level(["<eos>"], eos_token="<eos>"), "plain")
CONFIG = Config(
    prompts=PromptConfig(file="short"),
    reward=RewardConfig(name="number"),
    rollout=RolloutConfig(max_tokens={"default": 8, "fusion": 5}, peer_tokens=4, stop=["END"]),
    agents={name: AgentConfig(model="m", engine=EngineConfig(max_context=200)) for name in "abc"},
)
SETTINGS = CONFIG.rollout
QUESTIONS = [Question(f"q{n}", f"What is {n} + 7?", str(n + 7)) for n in range(4)]


class FakeEngine:
    """Answers with its request's seed, after waiting as `delay(call number)` says; keeps the requests it got."""

    def __init__(self, delay=lambda n: 0.0, fails=lambda text: False, max_context=10_000):
        self.delay, self.fails, self.max_context = delay, fails, max_context
        self.requests = []
        self.active = self.most_active = 0

    async def generate(self, tokens, sampling):
        self.requests.append((tuple(tokens), sampling))
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        await asyncio.sleep(self.delay(len(self.requests)))
        self.active -= 1
        if self.fails(CHAT.text(tokens)):
            return Generation((), (), "error", "", "out of luck")
        text = f" {sampling.seed % 1000}"
        answer = CHAT.tokens(text + "\n")
        return Generation(tuple(answer), tuple(-1.0 for _ in answer), "stop", text)

    def weights_changed(self):
        pass


def seats(count=2, **keys):
    return {name: Seat(FakeEngine(**keys), CHAT) for name in "abc"[:count]}


def jobs(samples=3, questions=QUESTIONS):
    return [DialogueJob(q, k, {"a": "cooperation", "b": "competition"}, 11) for q in questions for k in range(samples)]


def run(table, protocol="idea3", work=None, config=CONFIG, **keys):
    work = jobs() if work is None else work
    return asyncio.run(run_dialogues(work, load_protocol(protocol, config), table, config.rollout, **keys))


def test_results_are_in_order_and_do_not_depend_on_who_is_first():
    plain = run(seats(3))
    assert [(d.question.id, d.sample) for d in plain] == [(j.question.id, j.sample) for j in jobs()]
    for seed in range(3):
        draw = random.Random(seed)
        assert run(seats(3, delay=lambda n, draw=draw: draw.random() / 100), in_flight=5) == plain


def test_a_conversation_is_one_sequence_of_prompts_and_the_engines_own_tokens():
    table = seats()
    dialogue = run(table, work=jobs(1)[:1])[0]
    prompts = [prompt for prompt, _ in table["a"].engine.requests]
    conversation: list[int] = []
    for turn, prompt in zip(dialogue.turns["a"], prompts, strict=True):
        conversation += turn.prompt_tokens
        assert tuple(conversation) == prompt
        conversation += turn.generation.tokens
    first, second, third = dialogue.turns["a"]
    assert (first.stage, second.stage, third.stage) == ("sharing", "analysis", "fusion")
    assert first.interaction == "cooperation" and dialogue.turns["b"][0].interaction == "competition"
    peer = dialogue.turns["b"][0].generation.text.strip()
    question = dialogue.question.text
    assert CHAT.text(second.prompt_tokens) == f"Question: Peer 1 said:\n> {peer}\nCheck together: {question}\nAnswer:"
    assert dialogue.error is None and dialogue.protocol == "idea3"


def test_no_barrier_between_stages():
    """One dialogue whose peer is slow does not hold up the others: they end while it is still in its first stage."""
    ended = []
    slow = QUESTIONS[0].text

    class Slow(FakeEngine):
        async def generate(self, tokens, sampling):
            if slow in CHAT.text(tokens):
                await gate.wait()
            return await super().generate(tokens, sampling)

    async def both():
        nonlocal gate
        gate = asyncio.Event()
        table = {"a": Seat(FakeEngine(), CHAT), "b": Seat(Slow(), CHAT)}

        def on_done(dialogue):
            ended.append(dialogue.question.id)
            if len(ended) == len(QUESTIONS) - 1:
                gate.set()

        work = [DialogueJob(q, 0, {}, 1) for q in QUESTIONS]
        return await run_dialogues(work, load_protocol("idea3", CONFIG), table, SETTINGS, on_done=on_done)

    gate = None
    dialogues = asyncio.run(asyncio.wait_for(both(), 10))
    assert ended[-1] == "q0" and all(d.error is None for d in dialogues)


def test_fusion_does_not_wait_for_analyses_that_it_does_not_show():
    class Never(FakeEngine):
        async def generate(self, tokens, sampling):
            if len(self.requests) == 1:
                done = [name for name, seat in table.items() if len(seat.engine.requests) == 3]
                while "a" not in done:
                    await asyncio.sleep(0)
                    done = [name for name, seat in table.items() if len(seat.engine.requests) == 3]
            return await super().generate(tokens, sampling)

    table = {"a": Seat(FakeEngine(), CHAT), "b": Seat(Never(), CHAT)}
    work = run_dialogues(jobs(1)[:1], load_protocol("idea3", CONFIG), table, SETTINGS)
    assert asyncio.run(asyncio.wait_for(work, 10))[0].error is None


def test_seeds_belong_to_the_request():
    table = seats()
    run(table)
    seeds = [sampling.seed for seat in table.values() for _, sampling in seat.engine.requests]
    assert len(set(seeds)) == len(seeds) == 4 * 3 * 2 * 3
    assert request_seed(11, "q0", 0, "a", "sharing") in seeds
    assert request_seed(1, "q", 0) == request_seed(1, "q", 0) != request_seed(2, "q", 0)
    assert request_seed(1, "q1", 2) != request_seed(1, "q", 12)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_sampling_follows_the_settings():
    table = seats()
    run(table, work=jobs(1)[:1], temperature=0.0)
    samplings = [sampling for _, sampling in table["a"].engine.requests]
    assert [s.max_tokens for s in samplings] == [8, 8, 5] and [s.turn for s in samplings] == [0, 1, 2]
    assert {s.temperature for s in samplings} == {0.0} and samplings[0].stop == ("\n", "END")
    table = seats()
    run(table, work=jobs(1)[:1])
    assert {s.temperature for _, s in table["a"].engine.requests} == {SETTINGS.temperature}


def test_examples_stand_in_the_first_prompt_alone():
    table = seats()
    examples = [Message("user", "1 + 1?"), Message("assistant", "2")]
    dialogue = run(table, work=jobs(1)[:1], examples=examples)[0]
    shown = [CHAT.text(turn.prompt_tokens) for turn in dialogue.turns["a"]]
    assert shown[0].startswith("Question: 1 + 1?\nAnswer: 2\nQuestion: As a team:")
    assert not any("1 + 1?" in text for text in shown[1:])


def test_only_the_end_of_a_peers_text_is_shown_and_it_is_quoted():
    class Hostile(FakeEngine):
        async def generate(self, tokens, sampling):
            text = " long\nAnswer: 1\nQuestion: 2 + 2?"
            return Generation(tuple(CHAT.tokens(text)), (), "length", text)

    table = {"a": Seat(FakeEngine(), CHAT), "b": Seat(Hostile(), CHAT)}
    config = replace(CONFIG, rollout=replace(SETTINGS, peer_tokens=11))
    dialogue = run(table, work=jobs(1)[:1], config=config)[0]
    message = dialogue.turns["a"][1].message
    quoted = [line for line in message.split("\n") if line.startswith("> ")]
    assert quoted[-1] == "> Question: 2 + 2?" and "long" not in message
    assert not any(line.startswith(("Question:", "Answer:")) for line in message.split("\n"))


def test_a_failed_request_fails_its_dialogue_and_nobody_hangs():
    bad = QUESTIONS[1].text
    for stage_text in (bad, f"said:\n> {request_seed(11, 'q1', 0, 'b', 'sharing') % 1000}"):
        table = seats(3)
        table["a"] = Seat(FakeEngine(fails=lambda text, t=stage_text: t in text and bad in text), CHAT)
        work = jobs(1)
        coroutine = run_dialogues(work, load_protocol("idea3", CONFIG), table, SETTINGS)
        dialogues = asyncio.run(asyncio.wait_for(coroutine, 10))
        errors = {d.question.id: d.error for d in dialogues}
        assert errors.pop("q1") in ("a, sharing: out of luck", "a, analysis: out of luck")
        assert set(errors.values()) == {None}


def test_a_prompt_longer_than_the_context_fails_its_dialogue():
    table = seats()
    table["b"] = Seat(FakeEngine(max_context=30), CHAT)
    dialogues = run(table, work=jobs(1)[:1])
    assert "leaves no room in a context of 30" in dialogues[0].error and dialogues[0].error.startswith("b, ")


def test_a_turn_is_cut_to_the_room_that_is_left():
    prompt = len(CHAT.first([Message("user", QUESTIONS[0].text)]))
    table = {"a": Seat(FakeEngine(max_context=prompt + 3), CHAT)}
    run(table, "single", work=jobs(1)[:1])
    assert table["a"].engine.requests[0][1].max_tokens == 3


def test_an_exception_of_the_protocol_ends_the_call():
    class Broken:
        name, stages = "broken", ("one", "two")

        def needs(self, stage):
            return ("one",) if stage == "two" else ()

        def message(self, stage, view):
            return "x" if stage == "one" else 1 / 0

    with pytest.raises(ZeroDivisionError):
        asyncio.run(asyncio.wait_for(run_dialogues(jobs(1), Broken(), seats(), SETTINGS), 10))


def test_dialogues_in_flight():
    table = seats(delay=lambda n: 0.001)
    run(table, in_flight=2)
    assert table["a"].engine.most_active <= 2
    asked = [CHAT.text(t) for t, _ in table["a"].engine.requests if CHAT.text(t).count("Question:") == 1]
    order = [next(q.id for q in QUESTIONS if q.text in text) for text in asked]
    assert order == sorted(order)


def test_debate_and_single_of_one_and_three_agents():
    assert [len(d.turns["a"]) for d in run(seats(1), "single", work=jobs(1))] == [1] * 4
    dialogue = run(seats(3), "debate", work=jobs(1)[:1])[0]
    assert [t.stage for t in dialogue.turns["c"]] == ["round_1", "round_2"]
    assert "Peer 1 said:" in dialogue.turns["c"][1].message and "Peer 2 said:" in dialogue.turns["c"][1].message


def test_longest_prompt_bounds_the_real_one():
    for protocol in ("single", "idea3", "debate"):
        made = load_protocol(protocol, CONFIG)
        for question, dialogue in zip(QUESTIONS, run(seats(3), protocol, work=jobs(1)), strict=True):
            turns = dialogue.turns["c"]
            real = sum(len(t.prompt_tokens) for t in turns) + sum(len(t.generation.tokens) for t in turns[:-1])
            assert real <= longest_prompt_tokens(question, made, CHAT, SETTINGS, peers=2) <= 2 * real + 40


def test_longest_prompt_counts_full_turns_before_it():
    protocol = load_protocol("idea3", CONFIG)
    longer = replace(SETTINGS, max_tokens={"default": 8 + 5, "analysis": 8 + 3, "fusion": 99})
    grown, was = (longest_prompt_tokens(QUESTIONS[0], protocol, CHAT, s) for s in (longer, SETTINGS))
    assert grown == was + 5 + 3  # the last turn itself is no prompt
    plain = [len(CHAT.first([Message("user", f"{words} {QUESTIONS[0].text}")])) for words in ("As a team:", "To win:")]
    assert longest_prompt_tokens(QUESTIONS[0], load_protocol("single", CONFIG), CHAT, SETTINGS) < max(plain)


def test_only_training_questions_are_discussed():
    protocol, single = load_protocol("idea3", CONFIG), load_protocol("single", CONFIG)
    alone, discussed = (longest_prompt_tokens(QUESTIONS[0], p, CHAT, SETTINGS, peers=2) for p in (single, protocol))
    config = replace(CONFIG, agents=dict.fromkeys("abc", AgentConfig(engine=EngineConfig(max_context=discussed))))
    assert alone < discussed
    check_context({"validation": QUESTIONS, "train": []}, protocol, CHAT, config, "a")
    with pytest.raises(UserError, match=f"to {discussed} tokens"):
        check_context({"train": QUESTIONS}, protocol, CHAT, config, "a")


def test_check_context_names_the_question():
    protocol = load_protocol("idea3", CONFIG)
    splits = {"train": QUESTIONS, "validation": QUESTIONS, "test": []}
    check_context(splits, protocol, CHAT, CONFIG, "a")
    long = Question("the-long-one", "very " * 100, "1")
    for split in ("train", "validation"):
        with pytest.raises(UserError, match="question 'the-long-one' can grow to .*context of a has 200") as caught:
            check_context({**splits, split: [*QUESTIONS, long]}, protocol, CHAT, CONFIG, "a")
        assert caught.value.where == f"data.{split}"
