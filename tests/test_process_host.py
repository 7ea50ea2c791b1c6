"""Agents in processes of their own: the same bits as in this process, and no end of a worker that goes unnoticed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from end_to_end import agent, read_rows, save_models, weights_of, without_timings, write_config

from ilr_fast.cli import main
from ilr_fast.config_parse import load_config
from ilr_fast.errors import UserError
from ilr_fast.hosts import HostLost, messages
from ilr_fast.hosts.worker_log import WorkerLog
from ilr_fast.team import Team, open_team, prepare_chats
from ilr_fast.types import Generation, Sampling, StepResult, TrainingSequence, TrainingTurn

STEPS = 6
LONG = {"steps": STEPS, "rollout__max_tokens": 6, "log__tensorboard": False, "loss": {"kl": "k2", "beta": 0.01}}
PATIENCE = 10.0  # seconds in which the end of a worker must be noticed


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def config_file(folder: Path, models: Path, host: str, **changes) -> str:
    folder.mkdir(exist_ok=True)
    agents = {name: agent(models, name, host=host, engine={"slots": 4}) for name in ("ada", "bob")}
    return str(write_config(folder, models, **{"agents": agents, **LONG, **changes}))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, models):
    """The run with both agents in one process."""
    folder = tmp_path_factory.mktemp("local")
    assert main(["train", config_file(folder, models, "local"), "--debug"]) == 0
    return folder / "run"


def same_end(run: Path, other: Path, steps: int = STEPS) -> None:
    for name in ("ada", "bob"):
        assert weights_of(run, steps, name) == weights_of(other, steps, name), name
    for step in range(1, steps + 1):
        said = f"dialogues/step_{step:06d}.jsonl"
        assert (run / said).read_bytes() == (other / said).read_bytes(), step
    assert [without_timings(row) for row in read_rows(run)] == [without_timings(row) for row in read_rows(other)]


def workers_of(pid: int) -> list[int]:
    """The agents' processes that a process has started."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"ilr_fast.hosts.worker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def ended(pids: list[int], patience: float = PATIENCE) -> bool:
    """Whether the processes end in time; one that nobody has waited for yet has ended too."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if not any(Path(f"/proc/{pid}").exists() and state(pid) not in "ZX" for pid in pids):
            return True
        time.sleep(0.02)
    return False


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def test_a_run_with_processes_is_the_run_without_bit_for_bit(tmp_path, models, unbroken):
    assert main(["train", config_file(tmp_path, models, "process"), "--debug"]) == 0
    same_end(tmp_path / "run", unbroken)
    assert (tmp_path / "run" / "logs" / "ada.log").exists() and not workers_of(os.getpid())


@pytest.mark.parametrize("what", ["interrupt", "worker", "parent"])
def test_cut_off_it_leaves_no_process_and_goes_on_from_its_checkpoint(tmp_path, models, unbroken, what, capfd):
    command = [sys.executable, "-m", "ilr_fast.cli", "train", config_file(tmp_path, models, "process")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "run" / "dialogues" / "step_000002.jsonl").exists():
        time.sleep(0.0005)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    if what == "interrupt":  # as the terminal does: the whole group of processes
        for pid in (process.pid, *workers):
            os.kill(pid, signal.SIGINT)
    else:
        os.kill(workers[0] if what == "worker" else process.pid, signal.SIGKILL)
    _, told = process.communicate(timeout=6 * PATIENCE)  # that a death is noticed in time, the tests below time
    assert process.returncode == {"interrupt": 130, "worker": 1, "parent": -signal.SIGKILL}[what]
    assert ended(workers)
    if what == "worker":
        assert told.count("ilr-fast: ") == 1 and "its process was killed by SIGKILL" in told and "Traceback" not in told
        assert str(tmp_path / "run" / "logs") in told
    assert main(["train", config_file(tmp_path, models, "local")]) == 0
    assert "going on from step" in capfd.readouterr().out
    same_end(tmp_path / "run", unbroken)


def team_of(stack: ExitStack, folder: Path, models: Path, names=("ada", "bob"), **changes) -> Team:
    file = config_file(folder, models, "process", deterministic=False, **changes)
    config = load_config(file)
    config = replace(config, agents={name: config.agents[name] for name in names})
    return stack.enter_context(open_team(config, prepare_chats(config), logs=folder / "logs"))


def sequences(count: int, length: int = 40) -> list[TrainingSequence]:
    turns = (TrainingTurn(10, length, 1.0, (-3.0,) * (length - 10)),)
    return [
        TrainingSequence(f"q{n // 2}", n % 2, tuple((n + i) % 200 for i in range(length)), turns)
        for n in range(count)
    ]


def test_agents_generate_and_learn_at_the_same_time_and_share_their_fate(tmp_path, models):
    with ExitStack() as stack:
        team = team_of(stack, tmp_path, models)
        ada, bob = team.hosts.values()
        assert ada._link._moves > 0 and ".py:" in ada._link._at, "workers give signs of progress"

        async def ask(count: int, tokens: int) -> list[Generation]:
            wanted = [Sampling(max_tokens=tokens, seed=i, stop=("\0",)) for i in range(count)]
            return await asyncio.gather(*(h.generate([5, 6, 7], s) for s in wanted for h in (ada, bob)))

        before = ada.stats()
        first, again = asyncio.run(ask(12, 5)), asyncio.run(ask(12, 5))
        assert [g.tokens for g in first] == [g.tokens for g in again] and len({g.tokens for g in first}) > 12
        assert ada.stats()["tokens_generated"] - before["tokens_generated"] == 2 * sum(
            len(g.tokens) for g in first[::2]
        )
        mistake = asyncio.run(ada.generate([], Sampling(max_tokens=1)))
        assert mistake.finish == "error" and "empty" in mistake.error

        async def give_up() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask(4, 2000), 0.3)

        asyncio.run(give_up())
        steps = ada.stats()["steps"]
        time.sleep(0.3)
        assert ada.stats()["steps"] <= steps + 2, "requests that nobody waits for go on"

        many = sequences(300, 400)
        finish = ada.start_update(many, 1)
        assert bob.update(sequences(2), 1).tokens_trained == 60, "bob learns while ada does"
        assert finish().tokens_trained == 300 * 390
        with pytest.raises(UserError) as mistake:
            ada.load(models / "bob", tmp_path)
        assert "another model" in mistake.value.what and str(models / "bob") in mistake.value.where

        async def lose() -> float:
            asked = asyncio.ensure_future(ask(8, 4000))
            await asyncio.sleep(0.5)
            killed = time.monotonic()
            os.kill(ada.pid, signal.SIGKILL)
            with pytest.raises(HostLost, match="ada: its process was killed by SIGKILL"):
                await asked
            return time.monotonic() - killed

        assert asyncio.run(lose()) < PATIENCE
        with pytest.raises(HostLost, match="ada"):
            bob.stats()
        pids = [ada.pid, bob.pid]
    assert ended(pids, 0.1)


def test_a_worker_that_dies_in_an_update_is_named_with_its_log(tmp_path, models):
    with ExitStack() as stack:
        (ada,) = team_of(stack, tmp_path, models, ["ada"]).hosts.values()
        finish = ada.start_update(sequences(2000, 400), 1)
        time.sleep(0.3)
        os.kill(ada.pid, signal.SIGABRT)
        killed = time.monotonic()
        with pytest.raises(HostLost) as lost:
            finish()
        assert time.monotonic() - killed < PATIENCE
        assert "ada: its process was killed by SIGABRT" in str(lost.value)
        assert "Extension modules" in str(lost.value), "the log's end"
        assert "Fatal Python error: Aborted" in (tmp_path / "logs" / "ada.log").read_text()
    assert ended([ada.pid], 0.1)


def test_what_keeps_a_model_from_loading_reaches_the_user(tmp_path, models, capfd):
    for name in ("ada", "bob"):
        shutil.copytree(models / name, tmp_path / "broken" / name)
    settings = tmp_path / "broken" / "bob" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "intermediate_size": 49}))
    file = config_file(tmp_path, tmp_path / "broken", "process", interaction="none")
    assert main(["train", file]) == 1
    told = capfd.readouterr().err
    assert "bob: its process failed: RuntimeError" in told
    assert told.count("ignore_mismatched_sizes") == 2, "the log's end too"
    assert not workers_of(os.getpid())
    changes = ["run=" + str(tmp_path / "other"), "agents.ada.train=lora", "agents.ada.lora.targets=nothing"]
    assert main(["train", file, *changes, "agents.bob.model=" + str(models / "bob")]) == 2
    told = capfd.readouterr().err
    assert "ilr-fast: agents.ada.lora.targets = nothing: " in told and "Traceback" not in told
    assert not workers_of(os.getpid())


def test_messages_give_back_what_went_in():
    sampling = Sampling(7, 0.1 + 0.2, 0.9, 3, ("\n", "é\ud800"), 2**62, 2)
    generation = Generation((1, 2), (-0.1 - 0.2, -1e-300), "length", "\u2028x", None)
    result = StepResult({"loss": 0.1, "entropy": None}, 3, 4, "why")
    learned = sequences(3)
    with open(os.memfd_create("wire"), "w+b") as wire:
        data = [messages.from_sampling(sampling), messages.from_generation(generation), messages.from_result(result),
                messages.from_sequences(learned)]  # fmt: skip
        messages.write(wire, {"data": data})
        wire.write(b'{"cut": "o')
        wire.seek(0)
        (message,) = messages.read(wire)
    asked, said, made, sequences_ = message["data"]
    assert messages.to_sampling(asked) == sampling and messages.to_generation(said) == generation
    assert messages.to_result(made) == result and messages.to_sequences(sequences_) == learned
    for error in (UserError("what", "where", "remedy"), OSError(28, "No space left", "file"), OSError(13, "Denied")):
        again = messages.to_error(messages.from_error(error))
        assert (type(again), str(again)) == (type(error), str(error))
    assert messages.from_error(ValueError("ours")) is None


def test_secrets_do_not_reach_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    code = "import os; print('using', os.environ['HF_TOKEN']); print('last line')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    log = WorkerLog(process.stdout, tmp_path / "logs" / "ada.log")
    assert log.tail(10) == "using ***\nlast line" and process.wait() == 0
    assert (tmp_path / "logs" / "ada.log").read_text() == "using ***\nlast line\n"
