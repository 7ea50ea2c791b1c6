"""What a person sees of a run: step, phase, tokens a second, each agent's rewards and accuracy, the time left.

On a terminal a live display; plain lines where the output is no terminal (CI, a pipe), or NO_COLOR is set:

    with Progress(steps=14) as progress:
        with progress.phase("dialogues", 64) as advance:
            advance()                        # one of the 64 is done
        progress.step(row)                   # a metrics row
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

QUIET_SECONDS = 20.0  # in plain lines a phase says how far it is this often
_RECENT = 5  # steps whose mean time tells the time left

Row = Mapping[str, Any]


class Progress:
    """Shows a run of `steps` steps. Usable without `with`, then it prints plain lines only."""

    def __init__(self, steps: int, console: Console | None = None):
        self.steps = steps
        self.console = console or Console(highlight=False)
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal and not os.environ.get("NO_COLOR")
        self._times: deque[float] = deque(maxlen=_RECENT)
        self._row: Row | None = None
        self._said = time.monotonic()
        self._bars = Bars(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=self.console, auto_refresh=False,
        )  # fmt: skip
        self._all = self._bars.add_task("steps", total=steps, left="")
        self._display: Live | None = None

    def __enter__(self) -> Progress:
        if self.live:
            self._display = Live(get_renderable=self._render, console=self.console, refresh_per_second=2)
            self._display.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def note(self, text: str) -> None:
        """A line that stays."""
        self._print(Text(text))

    def warn(self, text: str) -> None:
        """A warning that stays."""
        self._print(Text(f"warning: {text}", style="yellow"))

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """Shows what is being done, of `total` parts where that is known; call what it yields when a part is done."""
        task = self._bars.add_task(name, total=total, left="")
        done = 0

        def advance(*_: object) -> None:
            nonlocal done
            if task not in self._bars.task_ids:  # another part has failed, and the phase is over
                return
            done += 1
            self._bars.advance(task)
            self._tell(f"{name} {done}" + (f"/{total}" if total else ""))

        self._tell(name)
        try:
            yield advance
        finally:
            self._bars.remove_task(task)

    def step(self, row: Row) -> None:
        """Shows a finished step from its metrics row."""
        self._row = row
        total = (row.get("seconds") or {}).get("total")
        if total is not None:
            self._times.append(total)
        left = self.seconds_left(row["step"])
        self._bars.update(self._all, completed=row["step"], left=f"{duration(left)} left" if left else "")
        if not self.live:
            self._print(Text(step_line(row, self.steps, left)))

    def seconds_left(self, step: int) -> float | None:
        """Seconds until the last step at the pace of the last ones; None before the first."""
        return sum(self._times) / len(self._times) * (self.steps - step) if self._times else None

    def _tell(self, text: str) -> None:
        """In plain lines: a word about a phase where nothing has been said for a while."""
        if not self.live and time.monotonic() - self._said >= QUIET_SECONDS:
            self._print(Text(f"  {text} …"))

    def _print(self, text: Text) -> None:
        self._said = time.monotonic()
        self.console.print(text, soft_wrap=True)

    def _render(self) -> RenderableType:
        return Group(agents_table(self._row), self._bars) if self._row else self._bars


def step_line(row: Row, steps: int, left: float | None) -> str:
    """One step in one line: `step 3/14  22 s  310 tok/s  gemma: reward 0.42, fusion 52% …  4 min left`."""
    parts = [f"step {row['step']}/{steps}"]
    seconds = row.get("seconds") or {}
    if seconds.get("total") is not None:
        parts.append(duration(seconds["total"]))
    if (speed := tokens_per_second(row)) is not None:
        parts.append(f"{speed:.0f} tok/s")
    for name, agent in row["agents"].items():
        known = [f"reward {number(agent.get('reward'))}"]
        known += [f"{stage} {percent(share)}" for stage, share in (agent.get("accuracy") or {}).items()]
        if agent.get("validation_accuracy") is not None:
            known.append(f"validation {percent(agent['validation_accuracy'])}")
        parts.append(f"{name}: {', '.join(known)}")
    if left:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def agents_table(row: Row) -> Table:
    """The agents' numbers of one step, one agent a line."""
    agents = row["agents"]
    stages = list(dict.fromkeys(stage for agent in agents.values() for stage in agent.get("accuracy") or {}))
    speed = tokens_per_second(row)
    table = Table(title=f"step {row['step']}" + (f" · {speed:.0f} tokens/s" if speed is not None else ""))
    for column in ("agent", "reward", *stages, "validation", "tokens/s"):
        table.add_column(column, justify="left" if column == "agent" else "right")
    for name, agent in agents.items():
        accuracy = agent.get("accuracy") or {}
        table.add_row(
            name,
            number(agent.get("reward")),
            *(percent(accuracy.get(stage)) for stage in stages),
            percent(agent.get("validation_accuracy")),
            number(agent.get("tokens_per_second"), 0),
        )
    return table


def tokens_per_second(row: Row) -> float | None:
    """Tokens that all agents generated, by the seconds of the generating phase."""
    generated, seconds = (row.get("tokens") or {}).get("generated"), (row.get("seconds") or {}).get("generate")
    return generated / seconds if generated is not None and seconds else None


def number(value: float | None, digits: int = 2) -> str:
    """A number for people; – where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share for people; – where there is none."""
    return "–" if value is None else f"{100 * value:.0f}%"


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
