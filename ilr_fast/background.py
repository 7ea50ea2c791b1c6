"""One piece of work at a time beside the main thread, whose failure is raised where it is waited for.

    background = Background()
    background.start(write_the_checkpoint)
    ...                        # what does not touch what is being written
    background.wait()
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event


class Background:
    """A thread that is there while something is to be done."""

    def __init__(self, name: str):
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._work: Future[object] | None = None

    @property
    def busy(self) -> bool:
        """Whether something was started that nobody has waited for yet."""
        return self._work is not None

    def start(self, work: Callable[[], object]) -> None:
        """Runs the work in the thread, once what was started before is done; raises what that one raised, and runs the
        new work all the same."""
        try:
            self.wait()
        finally:
            if self._work is None:  # else the wait was interrupted
                self._work = self._threads.submit(work)

    def wait(self) -> None:
        """Returns when all is done; raises what the work raised, once, also where an earlier wait was interrupted."""
        work = self._work
        if work is not None:
            wait([work])
            self._work = None
            work.result()

    def reached(self, mark: Event) -> None:
        """Returns when the work has set the mark, or raises as `wait` does where it ended before."""
        work = self._work
        if work is not None:
            work.add_done_callback(lambda _: mark.set())
            mark.wait()
            if work.done():
                self.wait()

    def close(self) -> None:
        """Waits for the thread's end and raises nothing: for a way out that has its own reason."""
        self._threads.shutdown(wait=True)
        self._work = None
