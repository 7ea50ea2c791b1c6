"""Ctrl-C, SIGTERM, a closed terminal: at once while nothing can be lost, after the critical section otherwise.

    with Interrupt() as interrupt:
        dialogues = generate()              # interrupted at once
        with interrupt.held():              # all agents are updated, or none
            update_all_agents(dialogues)
"""

from __future__ import annotations

import errno
import os
import signal
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WAITING = b"\ninterrupted: the update or checkpoint under way is finished first; once more cuts an update off\n"


class Interrupt:
    """Turns SIGINT, SIGTERM and SIGHUP into KeyboardInterrupt, put off while `held()`; a second one is not put off.

    A terminal that closes sends SIGHUP twice, once by its shell: that counts once. Where it is ignored, as under
    nohup, it stays so.
    """

    def __init__(self) -> None:
        self._holding = False
        self._pending = False
        self._hung_up = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_closed_terminals()
            if self._hung_up:
                return
            self._hung_up = True
        if self._holding and not self._pending:
            self._pending = True
            os.write(2, WAITING)  # not by print, which may be in the middle of a line
            return
        raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Puts an interruption off until the block is done."""
        assert not self._holding, "critical sections don't nest"
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt


def _leave_closed_terminals() -> None:
    """What is said from here on goes nowhere, instead of being an error that ends what is to be saved."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)
