"""Processes that share a GPU: who gets the service, what it is told, and that it ends with the run, by a kill too."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from end_to_end import agent, save_models, write_config

from ilr_fast import loading, team
from ilr_fast.config_parse import load_config
from ilr_fast.engines.pace import PLACE
from ilr_fast.errors import UserError
from ilr_fast.hosts import HostLost, sharing
from ilr_fast.hosts.link import Link
from ilr_fast.hosts.sharing import DAEMON, LOGS, PIPES, hint, listens, served

# Listens until it is told to quit; both of its ways to be called, as NVIDIA's. Where it is stubborn it does not quit.
FAKE = """#!{python}
import os, pathlib, socket, subprocess, sys, time
notes = pathlib.Path({notes!r})
if sys.argv[1:] != ["-f"]:
    sys.exit((notes / "quit").write_text(sys.stdin.read()) and 0)
(notes / "seen").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
server = subprocess.Popen(["sleep", "100"], start_new_session=True)
(notes / "server").write_text(str(server.pid))
(notes / "pid").write_text(str(os.getpid()))
listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listening.bind(os.environ["CUDA_MPS_PIPE_DIRECTORY"] + "/control")
listening.listen()
while not (notes / "quit").exists() or (notes / "stubborn").exists():
    time.sleep(0.02)
server.kill()
server.wait()
"""


@pytest.fixture
def notes(tmp_path, monkeypatch) -> Path:
    """A machine with a daemon that leaves notes here."""
    program = tmp_path / "bin" / DAEMON
    program.parent.mkdir()
    program.write_text(FAKE.format(python=sys.executable, notes=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv(PIPES, raising=False)
    monkeypatch.setattr(sharing, "_OWN_PIPES", tmp_path / "nobody listens")
    return tmp_path


def gone(notes: Path, patience: float = 10.0) -> bool:
    """Whether the daemon and its server have ended, or do soon."""
    pids, end = [(notes / name).read_text() for name in ("pid", "server")], time.monotonic() + patience
    while any(Path("/proc", pid).exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(Path("/proc", pid).exists() for pid in pids)


def test_the_service_lasts_as_long_as_it_is_used(notes, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    with served(True) as environment:
        assert environment[PIPES] == environment[LOGS] and Path(environment[PIPES], "control").exists()
        assert (notes / "seen").read_text() == "3,1" and environment["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert not (notes / "quit").exists() and not gone(notes, 0)
    assert (notes / "quit").read_text() == "quit -t 3\n" and gone(notes) and not Path(environment[PIPES]).exists()


def test_an_interruption_stays_one_and_leaves_nothing(notes):
    (notes / "stubborn").touch()  # else its end is no longer than what Popen waits for then
    with pytest.raises(KeyboardInterrupt), served(True) as environment:
        raise KeyboardInterrupt
    assert gone(notes, 0) and not Path(environment[PIPES]).exists()


def test_what_does_not_quit_is_killed_with_all_that_it_started(notes):
    (notes / "stubborn").touch()
    with served(True) as environment:
        assert not gone(notes, 0)
    assert (notes / "quit").exists() and gone(notes, 0) and not Path(environment[PIPES]).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_daemon_ends_without_its_keeper(notes, number):
    with served(True) as environment:
        keeper = int(Path("/proc", (notes / "pid").read_text(), "stat").read_text().rpartition(")")[2].split()[1])
        os.kill(keeper, number)
        if number == signal.SIGTERM:
            assert gone(notes)
    assert gone(notes) and not Path(environment[PIPES]).exists()


def test_a_long_path_for_temporary_files_is_not_taken(notes, monkeypatch):
    long = notes / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with served(True) as environment:
        assert len(environment[PIPES]) < 80 and listens(Path(environment[PIPES]))
    assert gone(notes)


@pytest.mark.parametrize("seen", ["", "GPU-5ca1ab1e"])
def test_devices_that_have_names_keep_them(notes, monkeypatch, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    with served(True) as environment:
        assert set(environment) == {PIPES, LOGS, PLACE}


def test_no_service_where_none_is_needed_or_one_is_there(notes, monkeypatch):
    with served(False) as environment:
        assert environment == {}
    with monkeypatch.context() as patched, served(True) as own:
        patched.setenv(PIPES, own[PIPES])  # the user's own daemon
        with served(True) as environment:
            assert set(environment) == {PLACE}
        patched.delenv(PIPES)
        patched.setattr(sharing, "_OWN_PIPES", Path(own[PIPES]))  # the machine's
        with served(True, keep_step=False) as environment:
            assert environment == {}
    monkeypatch.setattr(sharing, "_OWN_PIPES", notes / "nobody listens")
    monkeypatch.setenv("PATH", "/nowhere")
    with served(True) as environment:
        assert environment == {}


@pytest.mark.parametrize("kind", ["socket", "pipe"])
def test_pipes_that_a_daemon_has_left_behind_turn_nothing_off(notes, monkeypatch, kind):
    left = notes / "left"
    left.mkdir()
    monkeypatch.setattr(sharing, "_OWN_PIPES", left)
    if kind == "pipe":
        os.mkfifo(left / "control")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        if kind == "socket":
            dead.bind(str(left / "control"))
    with served(True) as environment:
        assert environment[PIPES] != str(left)
    (notes / "quit").unlink()
    monkeypatch.setenv(PIPES, str(left))
    with pytest.warns(UserWarning, match="no daemon listens there"), served(True) as environment:
        assert environment[PIPES] != str(left)


def test_a_pipe_that_is_read_is_somebody_s(tmp_path):
    os.mkfifo(tmp_path / "control")
    assert not listens(tmp_path)
    reading = os.open(tmp_path / "control", os.O_RDONLY | os.O_NONBLOCK)
    assert listens(tmp_path)
    os.close(reading)


def test_a_daemon_that_does_not_start_is_said(notes):
    (notes / "bin" / DAEMON).write_text("#!/bin/sh\necho no device for you\nexit 1\n")
    with pytest.warns(UserWarning, match="take turns on the GPU: no device for you"), served(True) as environment:
        assert environment == {}


def test_the_daemon_ends_with_a_command_that_is_killed(notes):
    script = f"""
from ilr_fast.hosts import sharing; import pathlib, time
sharing._OWN_PIPES = pathlib.Path({str(notes / "nobody listens")!r})
with sharing.served(True): print("open", flush=True); time.sleep(60)
"""
    command = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert command.stdout.readline() == "open\n" and not gone(notes, 0)
    command.send_signal(signal.SIGKILL)
    command.wait()
    command.stdout.close()
    assert gone(notes)


def environ(pid: int) -> bytes:
    """A process's environment, which is empty for a moment while it begins."""
    end = time.monotonic() + 10
    while not (found := Path(f"/proc/{pid}/environ").read_bytes()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_workers_are_its_clients(notes, tmp_path, monkeypatch):
    models = save_models(tmp_path / "models")
    agents = {name: agent(models, name, host="process", engine={"slots": 2}) for name in ("ada", "bob")}
    config = load_config(str(write_config(tmp_path, models, agents=agents)))
    monkeypatch.setattr(team, "_share_a_gpu", lambda config: True)

    def told(**keys: object) -> list[list[str]]:
        with ExitStack() as stack:
            hosts = team._start(replace(config, **keys), tmp_path, stack).values()
            places = [environ(host.pid) for host in hosts]
            return [[name for name in (PIPES, PLACE) if f"{name}=".encode() in place] for place in places]

    assert told(mps="never") == [[], []] and not (notes / "pid").exists()
    assert told(mps="auto", deterministic=False) == [[PIPES, PLACE]] * 2 and gone(notes, 0)
    (notes / "quit").unlink()
    assert told(mps="auto", deterministic=True) == [[PIPES]] * 2  # the command takes the steps in turn anyway


def test_who_shares(tmp_path, monkeypatch):
    models = save_models(tmp_path / "models")

    def shares(kind: str, *hosts: str, device: str = "cuda", sleep: str = "never") -> bool:
        monkeypatch.setattr(loading, "device_of", lambda agent, where: torch.device(kind))
        given = {
            f"a{n}": agent(models, "ada", host=host, device=device if n else "cuda", engine={"sleep": sleep})
            for n, host in enumerate(hosts)
        }
        return team._share_a_gpu(load_config(str(write_config(tmp_path, models, agents=given))))

    assert shares("cuda", "process", "process") and shares("cuda", "local", "process", "process")
    assert shares("cuda", "process", "process", sleep="cache")
    assert not shares("cuda", "process", "local") and not shares("cpu", "process", "process")
    assert not shares("cuda", "process", "process", device="cuda:1")
    assert not shares("cuda", "process", "process", sleep="turns")


# Answers with a mistake of the user's where it is asked to open, else ends with an error of CUDA's.
WORKER = """
import sys
from ilr_fast.hosts import messages
from ilr_fast.hosts.worker import pipes
requests, answers = pipes()
for message in messages.read(requests):
    if message["call"] != "open":
        sys.exit("RuntimeError: CUDA error: MPS client failed to connect to the MPS control daemon")
    messages.write(answers, {"answers": [[message["id"], None, ["user", "no CUDA device", "ada", "use cpu"]]]})
"""


@pytest.mark.parametrize("environment", [{}, {PIPES: "/nowhere"}])
def test_an_error_that_may_be_the_server_s_names_the_way_without(tmp_path, monkeypatch, environment):
    (tmp_path / "made_up_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    link = Link("ada", "made_up_worker", tmp_path / "ada.log", [], environment=environment)
    with pytest.raises(UserError, match="no CUDA device") as mistake:
        link.ask("open").result(30)
    with pytest.raises(HostLost, match="failed to connect") as lost:
        link.ask("generate").result(30)
    link.close()
    assert [("mps: never" in str(error.value)) for error in (mistake, lost)] == [bool(environment)] * 2
    assert not hint("this vLLM computes on cpu and the agent on cuda", {PIPES: "/x"})
    assert not hint("the model is not there", {PIPES: "/x"}) and not hint("CUDA out of memory", {PIPES: "/x"})
