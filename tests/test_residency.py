"""Who holds memory when: the scheduler with hosts that only count, and whole runs that must not change by it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from end_to_end import agent, read_rows, said_in, save_models, without_timings, write_config

from ilr_fast.cli import main
from ilr_fast.config import AgentConfig, Config, EngineConfig
from ilr_fast.errors import UserError
from ilr_fast.metrics import Timer
from ilr_fast.residency import Residency, leaving
from ilr_fast.types import Generation, Sampling, StepResult


class FakeHost:
    """Answers after some passes of the event loop, and refuses what its memory does not allow."""

    trains, max_context = True, 100

    def __init__(self, name: str, events: list[str], holds: dict[str, str], passes: int = 3, room: int = 99):
        self.name, self.events, self.holds, self.passes, self.room = name, events, holds, passes, room

    def note(self, what: str) -> None:
        if not self.events or self.events[-1] != f"{self.name} {what}":
            self.events.append(f"{self.name} {what}")

    async def generate(self, tokens, sampling):
        for _ in range(self.passes):
            await asyncio.sleep(0)
            assert self.holds[self.name] == "awake", f"{self.name} generates while it is {self.holds[self.name]}"
        self.note("generates")
        return Generation(tuple(tokens), (), "stop", self.name)

    def update(self, sequences, step):
        assert self.holds[self.name] != "away"
        self.note("learns")
        return StepResult({}, step, 0)

    def start_update(self, sequences, step):
        result = self.update(sequences, step)
        return lambda: result

    def hold(self):
        assert self.holds[self.name] != "away"
        return True

    def save_model(self, folder):
        assert self.holds[self.name] != "away"
        self.note("saves")

    save_state = save_model

    def load(self, model_folder, state_folder):
        assert self.holds[self.name] != "away"

    def forget(self):
        pass

    def reside(self, residence):
        self.holds[self.name] = residence
        self.note(residence)
        if sum(held != "away" for held in self.holds.values()) > self.room:
            raise UserError("no memory", self.name, "free some")


def made(sleep: dict[str, str], away=(), **keys):
    events, holds = [], {name: "away" if name in away else "awake" for name in sleep}
    residency = Residency({n: FakeHost(n, events, holds, **keys) for n in sleep}, sleep, away)
    return residency, residency.residents(), events, holds


def test_on_each_device_all_but_the_last_make_room():
    turns = EngineConfig(sleep="turns")
    devices = {"a": "cuda", "b": "cuda:1", "c": "auto", "d": "cuda:1", "e": "cuda:2"}
    agents = {name: AgentConfig(model="m", device=device, engine=turns) for name, device in devices.items()}
    assert leaving(Config(agents=agents)) == {"a", "b"}
    assert leaving(Config(agents={"a": agents["a"], "c": AgentConfig(model="m")})) == set()


def ask(*requests):
    async def gathered():
        return await asyncio.gather(*(host.generate([1] * tokens, Sampling(limit)) for host, tokens, limit in requests))

    return asyncio.run(gathered())


def test_keys_and_values_are_back_with_the_first_request_and_gone_for_updates():
    residency, present, events, holds = made({"a": "cache", "b": "cache", "c": "never"})
    a, b, c = present.values()
    ask((a, 1, 1), (b, 1, 1))
    assert events == ["a generates", "b generates"]
    finish = [host.start_update([], 4) for host in (a, b, c)]
    assert holds == {"a": "training", "b": "training", "c": "awake"}
    assert [f().tokens_trained for f in finish] == [4, 4, 4]
    assert a.hold() and holds["a"] == "training"
    a.save_model(Path())
    assert events[2:] == ["a training", "b training", "a learns", "b learns", "c learns", "a saves"]
    events.clear()
    ask((c, 1, 1))
    assert events == ["a training", "b training", "a awake", "b awake", "c generates"], "what torch keeps goes first"
    assert residency.swaps == 0


def test_one_agent_at_a_time_is_there_and_the_longest_queue_comes_next():
    residency, present, events, holds = made(dict.fromkeys("abc", "turns"), away="bc", room=1)
    a, b, c = present.values()
    results = ask((a, 2, 5), (b, 3, 5), (c, 3, 20), (a, 4, 5), (b, 5, 5))
    assert [len(r.tokens) for r in results] == [2, 3, 3, 4, 5] and [r.text for r in results] == list("abcab")
    assert events == ["a generates", "a away", "c awake", "c generates", "c away", "b awake", "b generates"]
    assert residency.swaps == 2 and residency.resident == "b"
    events.clear()
    finish = {name: host.start_update([], 1) for name, host in present.items()}
    assert not events, "updates wait"
    assert [finish[name]().tokens_trained for name in "abc"] == [1, 1, 1]
    learned = [event for event in events if "learns" in event]
    assert learned == ["b learns", "a learns", "c learns"], "the resident agent is the first"
    for host in present.values():
        assert not host.hold(), "a copy would bring each agent twice"
        host.save_model(Path())
        host.save_state(Path())
    assert list(holds.values()).count("away") == 2


def test_a_dialogue_goes_on_with_as_few_swaps_as_its_stages_allow():
    """Sharing by both, then two stages that need the peer's sharing: a, b b b, a a."""
    residency, present, events, _ = made(dict.fromkeys("ab", "turns"), away="b")
    a, b = present.values()

    async def dialogue():
        loop = asyncio.get_running_loop()
        shared = {host: loop.create_future() for host in (a, b)}

        async def speak(host, peer):
            shared[host].set_result(await host.generate([1], Sampling(1)))
            await shared[peer]
            for _ in range(2):
                await host.generate([1], Sampling(1))

        await asyncio.gather(speak(a, b), speak(b, a))

    async def many():
        await asyncio.gather(*(dialogue() for _ in range(20)))

    asyncio.run(many())
    assert residency.swaps == 2
    assert [event for event in events if "generates" in event] == ["a generates", "b generates", "a generates"]


def test_a_slow_agent_is_not_cut_off_and_nobody_spins_meanwhile(monkeypatch):
    residency, present, _, _ = made(dict.fromkeys("ab", "turns"), away="b")
    sleep, slept = asyncio.sleep, []
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: (slept.append(seconds), sleep(seconds))[1])

    async def slow():
        release = asyncio.Event()
        residency.hosts["a"].generate = lambda *_: release.wait()
        asked = [asyncio.ensure_future(host.generate([1], Sampling(1))) for host in present.values()]
        await sleep(0.05)
        assert not asked[1].done() and residency.resident == "a" and len(slept) < 50
        release.set()
        await asyncio.gather(*asked)

    asyncio.run(slow())
    assert residency.resident == "b"


def test_a_request_that_nobody_waits_for_brings_nobody():
    residency, present, _, _ = made(dict.fromkeys("ab", "turns"), away="b", passes=200)
    a, b = present.values()

    async def given_up():
        first = asyncio.ensure_future(a.generate([1], Sampling(1)))
        second = asyncio.ensure_future(b.generate([1], Sampling(1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second.cancel()
        await first
        await asyncio.sleep(0)

    asyncio.run(given_up())
    assert residency.swaps == 0 and residency.resident == "a"
    ask((b, 1, 1))  # in another event loop
    assert residency.resident == "b"


def test_memory_that_is_not_there_is_told_to_everybody_who_waits():
    _, present, _, _ = made(dict.fromkeys("abc", "turns"), away="bc", room=0)
    with pytest.raises(UserError, match="no memory"):
        ask((present["b"], 1, 1), (present["c"], 1, 1))


def test_moves_are_a_phase_of_their_own():
    clock = iter(range(100))
    residency, present, _, _ = made(dict.fromkeys("ab", "turns"), away="b")
    timer = Timer(lambda: next(clock))
    residency.timer = timer
    with timer("generate"):
        ask((present["a"], 1, 1))
    assert timer.seconds()["swap"] is None
    with timer("generate"):
        ask((present["b"], 1, 1))
    assert timer.seconds()["swap"] == 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def trained(folder: Path, models: Path, sleep: str, host: str = "local") -> Path:
    folder.mkdir()
    engine = {"slots": 4, "sleep": sleep}
    agents = {name: agent(models, name, host=host, engine=engine) for name in ("ada", "bob")}
    file = write_config(folder, models, agents=agents, steps=2, rollout__max_tokens=5, log__tensorboard=False)
    assert main(["train", str(file), "--debug"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def awake(tmp_path_factory, models) -> Path:
    """The run without sleep."""
    return trained(tmp_path_factory.mktemp("awake") / "local", models, "never")


@pytest.mark.parametrize(("sleep", "host"), [("cache", "local"), ("turns", "local"), ("turns", "process")])
def test_sleep_changes_no_dialogue(tmp_path, models, awake, sleep, host):
    run = trained(tmp_path / "run", models, sleep, host)
    for step in (1, 2):
        assert said_in(run, step) == said_in(awake, step), step
    assert all(row["seconds"]["swap"] > 0 for row in read_rows(run))
    assert all(row["seconds"]["swap"] is None for row in read_rows(awake))
    if sleep == "cache":
        assert [without_timings(row) for row in read_rows(run)] == [without_timings(row) for row in read_rows(awake)]

