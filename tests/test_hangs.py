"""A worker that hangs is noticed; one that works for long is not taken for one that hangs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from ilr_fast.hosts import HostLost
from ilr_fast.hosts.link import Link

# Answers `work` after some seconds in which it makes progress only by ticks, from one place; `hang` never.
WORKER = """
import sys, threading, time
from functools import partial
from ilr_fast.hosts import messages
from ilr_fast.hosts.pulse import Pulse
from ilr_fast.hosts.worker import pipes
from ilr_fast.ticks import tick

requests, answers = pipes()
Pulse(partial(messages.write, answers)).start()
for message in messages.read(requests):
    if message["call"] == "hang":
        threading.Event().wait()
    until = time.monotonic() + message["arguments"]["seconds"]
    tock = threading.Event()
    def ticking():
        while time.monotonic() < until:
            tick()
            time.sleep(0.3)
        tock.set()
    if message["call"] == "work":
        threading.Thread(target=ticking).start()
    else:
        while time.monotonic() < until:
            time.sleep(0.3)
        tock.set()
    tock.wait()
    messages.write(answers, {"answers": [[message["id"], "done", None]]})
"""
LIMIT = 3.0


@pytest.fixture()
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "made_up_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    found = Link("ada", "made_up_worker", tmp_path / "ada.log", [], hang_limit=LIMIT)
    yield found
    found.close()


def test_long_work_is_no_hang_and_idleness_neither(link: Link) -> None:
    assert link.ask("work", seconds=2 * LIMIT).result(30) == "done"
    time.sleep(LIMIT + 2)
    assert link.ask("work", seconds=0.1).result(30) == "done"


@pytest.mark.parametrize("how", ["hang", "stopped"])
def test_a_worker_without_progress_is_ended_and_named(link: Link, how: str) -> None:
    assert link.ask("work", seconds=0).result(30) == "done"
    start = time.monotonic()
    asked = link.ask("hang" if how == "hang" else "work", seconds=1000)
    if how == "stopped":
        os.kill(link.pid, signal.SIGSTOP)
    with pytest.raises(HostLost, match=r"ada: its process failed: no sign of progress for [345] s, last in") as lost:
        asked.result(60)
    assert LIMIT < time.monotonic() - start < LIMIT + 10
    assert "hang_limit" in str(lost.value)
    if how == "hang":
        assert "made_up_worker.py" in str(lost.value) or "threading.py" in str(lost.value)
    with pytest.raises(HostLost):
        link.ask("work", seconds=0)
