"""Grades the hostile programs in one mode of the sandbox and prints, as JSON, each grade and the harm that was done.

    python tests/hostile/run.py namespaces          as this user
    python tests/hostile/run.py namespaces nobody   as an ordinary user (started as root)
    python tests/hostile/run.py user                as root without namespaces

Where the interpreter lies in a folder that other users cannot enter (/root), it is first shown at the same place in
mounts of this process's own.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

from programs import GRANTED, PROGRAMS  # noqa: E402

from ilr_fast.rewards import make_grader, syscalls  # noqa: E402
from ilr_fast.types import Question  # noqa: E402

NOBODY = 65534


def main(mode: str, user: str | None) -> None:
    if os.getuid() == 0 and (user or mode == "user"):
        show_to_others({Path(sys.base_prefix), Path(sys.prefix), REPOSITORY})
    folder = Path(tempfile.mkdtemp(prefix="ilr-hostile-", dir="/tmp"))
    folder.chmod(0o777)
    (folder / "data").write_text("granted")
    (folder / "data").chmod(0o666)
    if user:
        os.chown(folder, NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    os.environ["ILR_SECRET"] = "granted"
    victim = subprocess.Popen(["sleep", "600"])
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    header = f"SECRET, VICTIM, PORT, FOLDER = 'ILR_SECRET', {victim.pid}, {server.getsockname()[1]}, {str(folder)!r}\n"
    try:
        grades = grade_all(mode, header)
        harm = find_harm(folder, victim, server)
    finally:
        victim.kill()
        victim.wait()
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"grades": grades, "harm": harm}))


def grade_all(mode: str, header: str) -> dict[str, list[object]]:
    tests = ["assert f(1, 2) == 3", "assert f(20, 30) == 50"]
    question = Question(id="sum", text="Add two numbers.", answer=GRANTED, metadata={"test_list": tests})
    programs = {"honest": GRANTED, **PROGRAMS}
    with make_grader("code", format_weight=0, time_limit=1.5, workers=2, isolation=mode) as grader:
        grades = grader.grade_many([(question, header + program) for program in programs.values()])
        again = grader.grade(question, GRANTED)  # nothing before it has broken the grader
    named = zip([*programs, "honest again"], [*grades, again], strict=True)
    return {name: [grade.reward, grade.correct, grade.error] for name, grade in named}


def find_harm(folder: Path, victim: subprocess.Popen[bytes], server: socket.socket) -> list[str]:
    time.sleep(0.5)
    harm = []
    if [p.name for p in folder.iterdir()] != ["data"] or (folder / "data").read_text() != "granted":
        harm.append("files were changed")
    if victim.poll() is not None:
        harm.append("a process was killed")
    places = ("/", "/etc", "/usr", "/usr/lib", "/var/tmp", "/dev/shm", "/root")
    if any(os.path.exists(f"{place}/ilr-hostile") for place in places):
        harm.append("files were written")
    try:
        server.accept()
        harm.append("a connection was made")
    except BlockingIOError:
        pass
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"rewards.jail" in command and f'"parent": {os.getpid()}'.encode() in command:
            harm.append(f"process {process.name} is left")
    return harm


def show_to_others(paths: set[Path]) -> None:
    """Mounts each path that lies in a private folder so that other users can reach it, in a new mount namespace."""
    hidden = {path: private for path in paths if (private := private_parent(path))}
    if not hidden:
        return
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    held = {path: os.open(path, os.O_PATH) for path in hidden}
    for private in set(hidden.values()):
        syscalls.mount("tmpfs", str(private), "tmpfs", 0, "mode=755")
    for path, descriptor in held.items():
        path.mkdir(parents=True, exist_ok=True)
        syscalls.mount(f"/proc/self/fd/{descriptor}", str(path), None, syscalls.MS_BIND | syscalls.MS_REC)


def private_parent(path: Path) -> Path | None:
    return next((p for p in reversed(path.parents) if not p.stat().st_mode & 0o001), None)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
