"""metrics.jsonl, one row a step, and the same numbers to TensorBoard, Weights & Biases and trackio.

Every row has every key of PHASES, TOKENS and AGENT; a number that does not exist (not measured, NaN, infinite) is null,
never 0, and is left out of the trackers' curves. `Timer` splits a step's seconds; a nested phase's are the inner one's:

    timer = Timer()
    with timer("generate"):
        …
    row["seconds"] = timer.seconds()
    with MetricsLog(folder, config, resume_step=0) as log:
        log.write(row)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ilr_fast.config import Config, LogConfig
from ilr_fast.durable import append_line, disk_errors, keep_lines
from ilr_fast.trackers import check_installed, open_trackers

PHASES = ("generate", "reward", "train", "sync", "swap", "checkpoint", "evaluate")
TOKENS = ("prompt", "generated", "trained", "dropped")
AGENT = (
    "accuracy", "reward", "calibrated_reward", "groups", "groups_dropped", "cooperation_share", "loss", "entropy",
    "kl_reference", "logp_diff_mean", "logp_diff_max", "engine_noise", "clip_share", "truncated_share", "grad_norm",
    "lr", "memory_peak_gib", "tokens_per_second", "validation_accuracy",
)  # fmt: skip


def check_trackers(log: LogConfig) -> None:
    """UserError where a tracker is asked for whose package is not installed."""
    for name in ("tensorboard", "wandb", "trackio"):
        if getattr(log, name):
            check_installed(name)


class Timer:
    """A step's seconds by phase, from the moment it is made. Phases may nest and may come several times."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._start = self._mark = clock()
        self._spent: dict[str, float] = {}
        self._open: list[str] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts the block's time for `phase`, one of PHASES; what runs inside for another phase is that one's."""
        assert phase in PHASES, phase
        self._settle()
        self._open.append(phase)
        self._spent.setdefault(phase, 0.0)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def move(self, seconds: float, source: str, target: str) -> None:
        """Gives some of what was counted for one phase to another that ran in it."""
        assert source in PHASES and target in PHASES
        seconds = min(seconds, self._spent.get(source, 0.0))
        self._spent[source] = self._spent.get(source, 0.0) - seconds
        self._spent[target] = self._spent.get(target, 0.0) + seconds

    def seconds(self) -> dict[str, float | None]:
        """Seconds by phase up to now, None for one that did not run; `other` is what is left of `total`."""
        self._settle()
        total = self._mark - self._start
        spent = {phase: self._spent.get(phase) for phase in PHASES}
        return {**spent, "other": max(0.0, total - sum(self._spent.values())), "total": total}

    def _settle(self) -> None:
        """Gives the time since the last mark to the innermost open phase."""
        now = self._clock()
        if self._open:
            self._spent[self._open[-1]] += now - self._mark
        self._mark = now


class MetricsLog:
    """Writes rows to `folder`/metrics.jsonl and to the trackers of `config.log`.

    Rows after `resume_step`, and a last line that was cut off, are removed: the run takes those steps again. `last_row`
    is the row of `resume_step` as the checkpoint holds it, for a kill between the checkpoint and its row.
    """

    def __init__(
        self, folder: Path, config: Config, *, resume_step: int = 0, last_row: Mapping[str, Any] | None = None
    ):
        self.path = folder / "metrics.jsonl"
        self._config, self._resume_step, self._last_row = config, resume_step, last_row
        self._stack = ExitStack()

    def __enter__(self) -> MetricsLog:
        keep_lines(self.path, lambda line: step_of(line) <= self._resume_step)
        self._trackers = self._stack.enter_context(open_trackers(self.path.parent, self._config, self._resume_step))
        steps = [row["step"] for row in read_metrics(self.path.parent)]
        if self._last_row is not None and self._last_row["step"] not in steps:
            self.write(self._last_row)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one step's row (see `complete`) and flushes it to the disk; UserError where that is full."""
        whole = complete(row)
        with disk_errors(self.path, "free some space and run the same command again"):
            append_line(self.path, json.dumps(whole, ensure_ascii=False, allow_nan=False))
            numbers = flatten(whole)
            for tracker in self._trackers:
                tracker.log(whole["step"], numbers)


def complete(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with every documented key, missing numbers None; keys beyond those are kept."""
    whole = _clean(row)
    agents = {name: {**dict.fromkeys(AGENT), **values} for name, values in whole["agents"].items()}
    seconds = {**dict.fromkeys((*PHASES, "other", "total")), **(whole.get("seconds") or {})}
    tokens = {**dict.fromkeys(TOKENS), **(whole.get("tokens") or {})}
    return {"step": whole["step"], **whole, "seconds": seconds, "tokens": tokens, "agents": agents}


def flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row by path, `agents/gemma/accuracy/fusion`; without what is not a number."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = float(value)
    flat.pop("step", None)
    return flat


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run; a last line that was cut off is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [json.loads(line) for line in lines if step_of(line) < math.inf]


def step_of(line: str) -> float:
    """The step of a line of JSON, infinite where it has none or can't be read."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _clean(value: Any) -> Any:
    """NaN and infinite → None, numpy's and torch's numbers → Python's."""
    if isinstance(value, Mapping):
        return {str(key): _clean(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    if not isinstance(value, (str, bool, int, float, type(None))) and hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
