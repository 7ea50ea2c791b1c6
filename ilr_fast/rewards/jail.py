"""A process that confines itself and then runs code that nobody trusts.

    python -c "…; from ilr_fast.rewards.jail import main; main()" '{"entry": "ilr_fast.rewards.candidate", …}'

It is three processes. The outer one prepares the confinement and supervises: when its parent hangs up or dies it ends
the rest. The middle one is process 1 of the new process namespace: when it ends, the kernel kills whatever the
program started, and nothing in the namespace can harm it. The inner one drops every right, says {"ready": true} and
runs `entry.serve`.

mode "namespaces": mount, process, network, IPC and host-name namespaces; as an ordinary user a user namespace too, as
  root an unused user id. The file system is a new one: the interpreter and system libraries read-only, four devices, an
  empty /tmp of limited size, no /proc.
mode "user" (as root where namespaces are not allowed): an unused user id. Landlock hides all files but the interpreter
  and libraries, nothing can be written at all; seccomp takes the sockets. The outer process, still root, kills all of
  that user's processes.

In both, resource limits on CPU seconds, memory, processes, file size and open files; no capabilities, no new
privileges, no environment; a seccomp filter.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from ilr_fast.rewards import landlock, seccomp, syscalls
from ilr_fast.rewards.worker import private_pipes

NEW_ROOT = "/proc"  # a folder that exists everywhere and that the new root does not need
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def main() -> None:
    """Reads the settings (sandbox.py writes them) from the command line; returns when all is over."""
    settings = json.loads(sys.argv[1])
    requests, answers = private_pipes()
    os.environ.clear()
    entry = importlib.import_module(settings["entry"])  # while the package can still be read
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != settings["parent"]:
        return
    try:
        if settings["mode"] == "namespaces":
            enter_namespaces(settings)
            child = _fork(lambda: init(settings, requests, answers, entry.serve))
        else:
            require_other_user()
            child = _fork(lambda: inner(settings, requests, answers, entry.serve))
    except (OSError, KeyError) as error:
        refuse(answers, error)
        return
    answers.close()
    try:
        supervise(child, requests)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        if settings["mode"] == "user":
            sweep(settings["uid"])


def supervise(child: int, requests: BinaryIO) -> None:
    """Returns when the child ended or the parent hung up."""
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(requests, 0)  # a hang-up is always reported
    poll.poll()


def init(settings: dict[str, Any], requests: BinaryIO, answers: BinaryIO, serve: Callable[..., None]) -> None:
    """Process 1: waits for the inner process; with this one the kernel ends the namespace."""
    child = _fork(lambda: inner(settings, requests, answers, serve))
    requests.close()
    answers.close()
    while os.wait()[0] != child:
        pass


def inner(settings: dict[str, Any], requests: BinaryIO, answers: BinaryIO, serve: Callable[..., None]) -> None:
    """Drops every right, then serves."""
    try:
        limit(settings)
        drop_rights(settings)
    except OSError as error:
        refuse(answers, error)
        return
    answers.write(b'{"ready": true}\n')
    answers.flush()
    serve(requests, answers)


def enter_namespaces(settings: dict[str, Any]) -> None:
    """Moves this process (for its children) into new namespaces and a new root. Raises OSError."""
    user, group = os.getuid(), os.getgid()
    flags = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNET
    flags |= syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
    syscalls.unshare(flags if user == 0 else flags | syscalls.CLONE_NEWUSER)
    if user != 0:
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    build_root(settings["readable"], settings["files_mib"])
    syscalls.pivot_into(NEW_ROOT)
    flags = syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("none", "/", None, flags)
    os.chdir("/tmp")


def build_root(readable: list[str], files_mib: int) -> None:
    """Mounts the new root at NEW_ROOT: `readable` read-only, a few devices, a /tmp of `files_mib` MiB."""
    syscalls.mount("tmpfs", NEW_ROOT, "tmpfs", syscalls.MS_NOSUID, "size=1m,mode=755")
    for path in readable:
        target = NEW_ROOT + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        _bind(path, target)
        syscalls.make_read_only(target)
    os.makedirs(NEW_ROOT + "/dev", exist_ok=True)
    for device in DEVICES:
        _bind(device, NEW_ROOT + device)
    os.makedirs(NEW_ROOT + "/tmp", exist_ok=True)
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("tmpfs", NEW_ROOT + "/tmp", "tmpfs", flags, f"size={files_mib}m,nr_inodes=1024,mode=1777")


def _bind(path: str, target: str) -> None:
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    syscalls.mount(path, target, None, syscalls.MS_BIND | syscalls.MS_REC)


def require_other_user() -> None:
    """Raises OSError where mode "user" would not confine: without root, Landlock, or a known machine."""
    if os.getuid() != 0:
        raise OSError("needs root")
    if landlock.version() == 0:
        raise OSError("the kernel has no Landlock (Linux 5.13)")
    if not seccomp.available():
        raise OSError(f"no system call table for {syscalls.MACHINE}")
    os.chdir("/")


def limit(settings: dict[str, Any]) -> None:
    """Sets the resource limits. CPU seconds are for each process; `cpu_seconds` None is no limit."""
    memory, files = settings["memory_mib"] << 20, settings["files_mib"] << 20
    # in a user namespace of its own the three processes of the jail count as well
    processes = settings["processes"] + (0 if os.getuid() == 0 else 3)
    limits = {
        resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: files, resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: processes, resource.RLIMIT_MEMLOCK: 0, resource.RLIMIT_STACK: 8 << 20,
    }  # fmt: skip
    if settings["cpu_seconds"] is not None:
        limits[resource.RLIMIT_CPU] = settings["cpu_seconds"]
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def drop_rights(settings: dict[str, Any]) -> None:
    """Another user (where this is root), no capabilities, no new privileges, the filters. Raises OSError."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(settings["uid"], settings["uid"], settings["uid"])
        os.setresuid(settings["uid"], settings["uid"], settings["uid"])
        for path in settings["readable"]:
            if not os.access(path, os.R_OK):
                raise OSError(f"other users cannot read {path}: use a Python outside of private folders")
    syscalls.drop_capabilities()
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    if settings["mode"] == "user":
        landlock.restrict(settings["readable"])
    if seccomp.available():
        seccomp.install()


def sweep(uid: int) -> None:
    """Kills every process of the user `uid`, as that user, so that nobody else can be hit."""

    def kill_all() -> None:
        os.setresuid(uid, uid, uid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)

    os.waitpid(_fork(kill_all), 0)


def refuse(answers: BinaryIO, error: Exception) -> None:
    """Tells the parent why this jail cannot be."""
    answers.write(json.dumps({"ready": False, "error": str(error)}).encode() + b"\n")
    answers.flush()


def _fork(body: Callable[[], None]) -> int:
    """Runs `body` in a child that dies with this process and never returns; gives the child's id."""
    alive, held = os.pipe()
    child = os.fork()
    if child:
        os.close(alive)
        return child  # `held` stays open as long as this process lives
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _run(body, alive, held)


def _run(body: Callable[[], None], alive: int, held: int) -> NoReturn:
    try:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(held)
        poll = select.poll()
        poll.register(alive, 0)
        if not poll.poll(0):  # else the parent ended before the line above took effect
            os.close(alive)
            body()
    finally:
        os._exit(0)
