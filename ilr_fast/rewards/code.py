"""Programs: the code in the text must pass the data's tests (MBPP's `test_list`), in a sandbox.

    grader = make_grader("code", time_limit=5.0)    # UserError where this machine allows no sandbox

The program is the last fenced block that defines something, else the last block, else the whole text; the asked form
is a closed fenced block. It runs, then `test_setup_code` (and `test_imports`), then each test, all within
`time_limit` seconds. Program and tests are in two jails (jail.py): the program's evaluates the tests' calls, the
other compares (checker.py says why).

What remains possible to a hostile program: to answer the calls that it has seen with constants (the prompt often
shows the tests); to satisfy a test that names no expected value (`f(x) == f(y)`); within its limits, to use the
machine's CPU, and whatever a hole in the kernel allows. A data set whose tests are hostile is confined in the same
way.
"""

from __future__ import annotations

import math
import re
import time
from typing import Any

from ilr_fast.rewards.base import BaseGrader
from ilr_fast.rewards.channel import Channel, Closed, Expired
from ilr_fast.rewards.pool import Broken, Pool
from ilr_fast.rewards.sandbox import Limits, Mode, Sandbox
from ilr_fast.types import Grade, Question

LONGEST_PROGRAM = 200_000
FENCE = re.compile(r"^[ \t]*```[ \t]*([A-Za-z0-9_+-]*)[ \t]*\r?$", re.MULTILINE)


class CodeGrader(BaseGrader):
    """Runs programs in `workers` pairs of jails.

    `time_limit`: seconds for a program and its tests, by the clock and for each process by the CPU. `memory_mib` of
    address space for each of at most `processes` processes and threads. `isolation`: "namespaces" or "user" insists on
    one mode of jail.py; by default the strongest that works.
    """

    def __init__(
        self, format_weight: float = 0.1, time_limit: float = 5.0, workers: int = 1, memory_mib: int = 512,
        processes: int = 4, isolation: Mode | None = None,
    ):  # fmt: skip
        super().__init__(format_weight, workers)
        self.time_limit = time_limit
        self.sandbox = Sandbox(Limits(memory_mib=memory_mib, processes=processes), isolation)
        self._checkers = Pool(lambda: self.sandbox.launch("ilr_fast.rewards.checker", cpu_seconds=None), workers)

    def grade(self, question: Question, text: str) -> Grade:
        """Runs the tests of the question's metadata; a question without tests gives None."""
        program, formatted = find_program(text)
        task = task_of(question, program)
        if not task["tests"]:
            return self.broken(formatted, program, "the question has no tests (test_list)")
        if len(program) > LONGEST_PROGRAM or not program.strip():
            return self.verdict(False, formatted, program, "no program, or one too long")
        try:
            result = self._run(task)
        except Expired:
            error = f"timeout: program and tests took more than {self.time_limit:g} s"
            return self.timed_out(formatted, program, error)
        except (Broken, Closed) as failure:
            return self.broken(formatted, program, f"the sandbox failed: {failure}")
        if "broken" in result:
            return self.broken(formatted, program, result["broken"])
        return self.verdict(result["verdict"], formatted, program, result["error"])

    def close(self) -> None:
        """Ends the checkers."""
        self._checkers.close()

    def _run(self, task: dict[str, Any]) -> dict[str, Any]:
        program = self.sandbox.launch("ilr_fast.rewards.candidate", math.ceil(self.time_limit) + 1)
        try:
            with self._checkers.lend() as checker:
                self.sandbox.ready(program)
                return relay(task, checker, program, time.monotonic() + self.time_limit)
        finally:
            program.close(patience=2)


def relay(task: dict[str, Any], checker: Channel, program: Channel, deadline: float) -> dict[str, Any]:
    """Carries the checker's questions to the program until the verdict. Raises Expired, or the checker's Closed.

    The program's answers pass through unread: they are for the confined checker to make sense of.
    """
    checker.send(task, deadline)
    ended: bytes | None = None
    while "ask" in (message := checker.receive(deadline)):
        if ended is None:
            try:
                program.send(message["ask"], deadline)
                answer = program.receive_line(deadline)
            except Closed as error:
                ended = b'{"raise": "RuntimeError", "text": "the program %s"}\n' % str(error).encode()
        checker.send_line(ended or answer, deadline)
    return message


def task_of(question: Question, program: str) -> dict[str, Any]:
    """What the checker needs: program, tests, set-up, and the reference solution (for the names that it defines)."""
    metadata = question.metadata
    tests = metadata.get("test_list") or metadata.get("tests") or []
    setup = [*(metadata.get("test_imports") or []), metadata.get("test_setup_code") or ""]
    return {
        "program": program, "tests": [tests] if isinstance(tests, str) else list(tests), "setup": "\n".join(setup),
        "reference": question.answer,
    }  # fmt: skip


def find_program(text: str) -> tuple[str, bool]:
    """The program in a text, and whether it stands in a closed fenced block."""
    fences = list(FENCE.finditer(text))
    blocks = [text[start.end() : end.start()] for start, end in zip(fences[::2], fences[1::2], strict=False)]
    if blocks:
        return next((b for b in reversed(blocks) if re.search(r"^(?:def|class|async def) ", b, re.M)), blocks[-1]), True
    return (text[fences[0].end() :] if fences else text), False
