"""Ctrl-C: at once, or after what must not be cut in two, and then the user is told what is waited for."""

from __future__ import annotations

import os
import pty
import signal
import sys

import pytest

from ilr_fast.interrupt import Interrupt


@pytest.fixture(autouse=True)
def no_nohup():
    """SIGHUP as in a terminal, also where the tests run under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_at_once_where_nothing_can_be_lost(capfd):
    with pytest.raises(KeyboardInterrupt), Interrupt():
        press()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_put_off_until_the_block_is_done_and_said_so(capfd, number):
    done = []
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
        with interrupt.held():
            os.kill(os.getpid(), number)
            done.append(True)
        done.append(False)
    assert done == [True] and "is finished first" in capfd.readouterr().err


def test_a_second_one_is_not_put_off(capfd):
    done = []
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt), interrupt.held():
        press()
        press()
        done.append(True)
    assert not done and capfd.readouterr().err.count("is finished first") == 1
    previous = signal.getsignal(signal.SIGINT)
    with Interrupt():
        assert signal.getsignal(signal.SIGINT) != previous
    assert signal.getsignal(signal.SIGINT) == previous


def test_a_terminal_that_closes_hangs_up_twice_and_cuts_nothing_off(capfd):
    done = []
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
        with interrupt.held():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            done.append(True)
        done.append(False)
    assert done == [True]


def test_a_closed_terminal_is_ignored_under_nohup():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_what_is_said_to_a_closed_terminal_ends_nothing(tmp_path):
    script = f"""
import os, signal, time
from ilr_fast.interrupt import Interrupt
with Interrupt() as interrupt:
    try:
        with interrupt.held():
            print("begun", flush=True)
            while not interrupt._pending:
                time.sleep(0.01)
            print("said", flush=True)
    except KeyboardInterrupt:
        open({str(tmp_path / "saved")!r}, "w").close()
"""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", script])
    assert os.read(terminal, 5) == b"begun"
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0 and (tmp_path / "saved").exists()
