"""The sandbox against hostile programs: none is rewarded, nothing is harmed, nothing outlives the run.

Each mode runs in a process of its own (tests/hostile/run.py); where the tests run as root, as an ordinary user too.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ilr_fast.rewards import seccomp

HOSTILE = Path(__file__).parent / "hostile"
sys.path.append(str(HOSTILE))
from programs import PROGRAMS  # noqa: E402

ROOT = os.getuid() == 0
MODES = [["namespaces"], ["namespaces", "nobody"], ["user"]] if ROOT else [["namespaces"]]
pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="the sandbox is Linux's")


def run(mode: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HOSTILE / "run.py"), *mode]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_hostile_programs_get_nothing_and_harm_nothing(mode: list[str]):
    result = run(mode)
    if "cannot be confined" in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-2])
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["harm"] == []
    grades = report["grades"]
    assert grades.pop("honest")[:2] == grades.pop("honest again")[:2] == [1, True]
    assert set(grades) == set(PROGRAMS)
    assert {name: grade for name, grade in grades.items() if grade[0] != 0} == {}


@pytest.mark.skipif(not ROOT, reason="needs root to become another user")
def test_an_ordinary_user_without_namespaces_is_refused_with_the_reason():
    result = run(["user", "nobody"])
    assert result.returncode != 0 and "cannot be confined" in result.stderr and "needs root" in result.stderr


ATTACKS = ["environment", "environment of others", "memory of others", "read the data", "write outside", "connect",
           "open a socket", "start a program", "kill", "delete"]  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attacks_succeed_without_the_sandbox(name: str, tmp_path: Path):
    import socket

    (tmp_path / "data").write_text("granted")
    environment = os.environ | {"ILR_SECRET": "granted"}
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "60"], env=environment) as victim:
        where = f"{victim.pid}, {server.getsockname()[1]}, {str(tmp_path)!r}"
        program = f"SECRET, VICTIM, PORT, FOLDER = 'ILR_SECRET', {where}\n{PROGRAMS[name]}\nprint(f is not None)"
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        victim.kill()
    assert result.stdout == "True\n"


LONG_RUN = """
import sys
sys.path[:0] = [{hostile!r}]
import run
mode = sys.argv[1]
if mode == "user": run.show_to_others({{run.Path(sys.base_prefix), run.Path(sys.prefix), run.REPOSITORY}})
question = run.Question(id="q", text="?", answer="", metadata={{"test_list": ["assert f()"]}})
grader = run.make_grader("code", time_limit=60, isolation=mode)
print("ready", flush=True)
grader.grade(question, run.PROGRAMS["daemon"] + "\\nimport time\\nwhile True: time.sleep(1)")
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("mode", ["namespaces", "user"] if ROOT else ["namespaces"])
def test_jails_end_with_the_run(mode: str, end: signal.Signals):
    command = [sys.executable, "-c", LONG_RUN.format(hostile=str(HOSTILE)), mode]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stderr is not None
    if parent.stdout.readline() != "ready\n":
        pytest.skip(parent.stderr.read())
    # the checker's processes, the program's, and the daemon that it started
    until(lambda: len(jails(parent.pid)) >= (7 if mode == "namespaces" else 5))
    parent.send_signal(end)
    parent.wait(20)
    until(lambda: not jails(parent.pid))


def until(condition: object) -> None:
    for _ in range(100):
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.1)
    pytest.fail("did not come true in 10 s")


def jails(parent: int) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"rewards.jail" in command and f'"parent": {parent}'.encode() in command:
            found.append(process.name)
    return found


@pytest.mark.parametrize("machine", list(seccomp.DENIED))
def test_the_filters_jumps_stay_inside(machine: str):
    program = seccomp.program(machine)
    for at, (operation, yes, no, _) in enumerate(program):
        if operation in (seccomp.EQUAL, seccomp.AT_LEAST, seccomp.ANY_BIT):
            assert at + 1 + max(yes, no) < len(program)
    assert program[-1] == (seccomp.RETURN, 0, 0, seccomp.ALLOW)
    assert run_filter(program, machine, seccomp.CLONE[machine], 0x10000000) == seccomp.ERRNO | 1
    assert run_filter(program, machine, seccomp.CLONE[machine], 0x11) == seccomp.ALLOW
    assert run_filter(program, machine, seccomp.CLONE3, 0) == seccomp.ERRNO | 38
    assert all(run_filter(program, machine, number, 0) == seccomp.ERRNO | 1 for number in seccomp.DENIED[machine])
    assert run_filter(program, machine, 4096, 0) == seccomp.ALLOW
    assert run_filter(program, "other", 0, 0) == seccomp.KILL


def run_filter(program: list[tuple[int, int, int, int]], machine: str, number: int, argument: int) -> int:
    """Interprets the filter for one system call."""
    data = {seccomp.NUMBER: number, seccomp.ARCHITECTURE: seccomp.ARCHITECTURES.get(machine, 0)}
    at = register = 0
    while True:
        operation, yes, no, operand = program[at]
        if operation == seccomp.RETURN:
            return operand
        if operation == seccomp.LOAD:
            register, yes, no = data.get(operand, argument), 0, 0
            at += 1
            continue
        true = {
            seccomp.EQUAL: register == operand, seccomp.AT_LEAST: register >= operand,
            seccomp.ANY_BIT: bool(register & operand),
        }[operation]  # fmt: skip
        at += 1 + (yes if true else no)
