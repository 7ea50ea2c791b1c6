"""A run folder as the report reads it, whatever its state: unfinished, without an evaluation, cut off in mid-write.

Only a folder that is no run at all is refused. Numbers that do not exist are None and stay None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ilr_fast.data import TASK
from ilr_fast.errors import UserError
from ilr_fast.transcripts import read_jsonl

Row = Mapping[str, Any]
STAGES = ("single", "answer", "sharing", "analysis", "fusion")


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    path: Path
    name: str
    config: Row
    environment: Row
    metrics: Sequence[Row]
    results: Sequence[Row]
    failures: Sequence[Row]

    @property
    def agents(self) -> list[str]:
        """Agents in the config's order; those of the rows where the config is gone."""
        named = list(mapping(self.config.get("agents")))
        logged = [agent for row in self.metrics for agent in mapping(row.get("agents"))]
        return list(dict.fromkeys(named + logged + [str(row["agent"]) for row in self.results]))

    @property
    def learners(self) -> list[str]:
        """The agents that are trained; all where the config freezes none, or all."""
        agents = mapping(self.config.get("agents"))
        return [a for a in self.agents if mapping(agents.get(a)).get("train") != "none"] or self.agents

    @property
    def steps_planned(self) -> int | None:
        planned = dig(self.config, "steps")
        return None if planned is None else int(planned)

    @property
    def steps_done(self) -> int:
        return max((int(row["step"]) for row in self.metrics), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether all planned steps are done."""
        return self.steps_planned is not None and self.steps_done >= self.steps_planned

    @property
    def seed(self) -> int | None:
        seed = dig(self.config, "seed")
        return None if seed is None else int(seed)

    @property
    def stages(self) -> list[str]:
        """The stages that were graded, in the order in which they are spoken."""
        agents = [mapping(a) for row in self.metrics for a in mapping(row.get("agents")).values()]
        found = {stage for agent in agents for stage in mapping(agent.get("accuracy"))}
        return sorted(found, key=lambda s: (STAGES.index(s) if s in STAGES else len(STAGES), s))

    def column(self, agent: str, *keys: str) -> list[tuple[float, float | None]]:
        """A number of one agent over the steps; None where it does not exist."""
        return [(row["step"], dig(row, "agents", agent, *keys)) for row in self.metrics]

    def outcomes(self, row: Row) -> dict[str, list[bool]]:
        """Right or wrong by question for a results row, from the file that it names; {} where there is none."""
        name = row.get("outcomes")
        path = self.path / str(name)
        if not name or not path.resolve().is_relative_to(self.path.resolve()):
            return {}
        return outcomes_by_agent(path).get(str(row.get("agent")), {})


@lru_cache(maxsize=4096)
def outcomes_by_agent(path: Path) -> dict[str, dict[str, list[bool]]]:
    """Right or wrong by agent and question, of a file in evaluations/; read once, as every comparison needs it."""
    found: dict[str, dict[str, list[bool]]] = {}
    for row in read_jsonl(path):
        if isinstance(row.get("correct"), list):
            found.setdefault(str(row.get("agent")), {})[str(row.get("question"))] = [bool(c) for c in row["correct"]]
    return found


def read_run(path: Path, name: str | None = None) -> Run:
    """Reads a run folder. UserError where it is none."""
    if not path.is_dir():
        raise UserError("there is no such folder", str(path), "give a run folder (the key `run` of its config)")
    if not _is_run(path):
        raise UserError("not a run folder: no config.yaml, metrics.jsonl or results.json in it", str(path),
                        "give the folder that `ilr-fast train` wrote, or one that holds such folders")
    by_step = {row["step"]: row for row in read_jsonl(path / "metrics.jsonl") if isinstance(row.get("step"), int)}
    return Run(
        path,
        name or path.resolve().name,
        _read_config(path / "config.yaml"),
        _read_json(path / "environment.json", dict),
        [by_step[step] for step in sorted(by_step)],
        [row for row in _read_json(path / "results.json", list) if _is_result(row)],
        list(read_jsonl(path / "failures.jsonl")),
    )


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Several runs, each under a name of its own (as much of the path as tells them apart); a folder of runs is all."""
    resolved = [run.resolve() for path in paths for run in (runs_below(path) or [path])]
    if len(set(resolved)) < len(resolved):
        raise UserError("the same run twice", ", ".join(map(str, paths)), "name each run once")
    runs = []
    for path in resolved:
        parts = 1
        while parts < len(path.parts) and any(
            other != path and other.parts[-parts:] == path.parts[-parts:] for other in resolved
        ):
            parts += 1
        runs.append(read_run(path, "/".join(path.parts[-parts:])))
    return runs


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping; an empty one for anything else, such as a field that is missing or broken."""
    return value if isinstance(value, Mapping) else {}


def asks_anew(run: Run, benchmark: str) -> bool:
    """Whether the seed draws the benchmark's questions: those of a generated task, and a part of the training data."""
    source = mapping(run.config.get("data")).get("test") if benchmark == "test" else benchmark
    return source is None or str(source).startswith(TASK)


def dig(row: Any, *keys: str) -> float | None:
    """A number inside nested mappings; None where a key, or the number, does not exist."""
    for key in keys:
        row = row.get(key) if isinstance(row, Mapping) else None
    is_number = isinstance(row, (int, float)) and not isinstance(row, bool)
    return float(row) if is_number and row == row and abs(row) != float("inf") else None


def _is_result(row: Any) -> bool:
    named = ("agent", "method", "benchmark", "mode")
    return (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in named)
            and all(dig(row, key) is not None for key in ("n", "accuracy")))


def _read_config(path: Path) -> Row:
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _read_json(path: Path, kind: type) -> Any:
    if not path.is_file():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return kind()
    if kind is list and isinstance(value, dict):
        value = value.get("rows", [])
    return value if isinstance(value, kind) else kind()


def runs_below(path: Path) -> list[Path]:
    """The runs in a folder that is no run itself, such as an ablation's; [] for a run."""
    return [] if _is_run(path) else sorted(file.parent for file in path.glob("*/config.yaml"))


def _is_run(path: Path) -> bool:
    return any((path / file).exists() for file in ("config.yaml", "metrics.jsonl", "results.json"))
