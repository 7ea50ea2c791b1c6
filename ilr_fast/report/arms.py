"""Runs that differ in nothing but their seed are one arm: their curves become a mean with a band, their results a line.
Data files may be each seed's own, named by it (`problems/1/train.jsonl`, `train-seed2.jsonl`).

>>> common_name(["runs/ilr-seed1", "runs/ilr-seed2"]), common_name(["1/grpo", "2/grpo"]), common_name(["a", "b"])
('runs/ilr', 'grpo', None)
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os.path import commonprefix
from typing import Any

from ilr_fast.report.runs import Row, Run, mapping
from ilr_fast.runfolder import MAY_DIFFER

# What may differ between the runs of one arm: the draw, and what a run may change when it goes on.
_NOT_COMPARED = ("seed", "deterministic", *MAY_DIFFER)


@dataclass(frozen=True, slots=True)
class Arm:
    """The runs of one config, by seed."""

    label: str
    runs: Sequence[Run]

    @property
    def agents(self) -> list[str]:
        """Those that learn: a frozen peer has no curve."""
        return list(dict.fromkeys(agent for run in self.runs for agent in run.learners))

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(stage for run in self.runs for stage in run.stages))


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """The runs as arms, in the order in which they are named; a run without a config is an arm of its own."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(_identity(run.config) if run.config else f"run {run.name}", []).append(run)
    arms = [Arm(_label(group), group) for group in members.values()]
    shared = Counter((arm.label, agent) for arm in arms for agent in arm.agents)  # `grpo` of two agents are two arms
    return [Arm(arm.runs[0].name, arm.runs) if any(shared[arm.label, a] > 1 for a in arm.agents) else arm
            for arm in arms]  # fmt: skip


def common_name(names: Sequence[str]) -> str | None:
    """What names that differ in a number share: the part before it, or behind it; None where that says nothing."""
    before = re.sub(r"(?:[^0-9A-Za-z]*(?:seed|s|run))?[^0-9A-Za-z]*$", "", re.sub(r"\d+$", "", commonprefix(names)))
    behind = commonprefix([name[::-1] for name in names])[::-1]
    behind = behind.partition("/")[2] if "/" in behind else ""
    return next((part for part in (before, behind) if re.search(r"[A-Za-z]", part)), None)


def differing_keys(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """The config keys in which the arms differ, each with every arm's value; "–" where an arm has no such key.

    What an agent that takes part in some arms alone is set to is no difference; that it does is.
    """
    flat = [_compared(arm.runs[0].config) for arm in arms]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = [("agents", [", ".join(arm.runs[0].agents) for arm in arms])]
    rows += [(key, [_text(one[key]) if key in one else "–" for one in flat]) for key in keys]
    return [(key, values) for key, values in rows
            if len(set(values) - ({"–"} if key.startswith("agents.") else set())) > 1]  # fmt: skip


def titles(arms: Sequence[Arm]) -> list[str]:
    """What each arm's own figures are called: nothing for a single arm; with its agents where a label comes twice."""
    counts = Counter(arm.label for arm in arms)
    return ["" if len(arms) == 1 else arm.label + (f" of {', '.join(arm.agents)}" if counts[arm.label] > 1 else "")
            for arm in arms]  # fmt: skip


def _label(runs: Sequence[Run]) -> str:
    """What the runs' names share, without the name of the only agent that learns; else their method."""
    if len(runs) == 1:
        return _without_agent(re.sub(r"-seed\d+$", "", runs[0].name), runs[0])
    shared = common_name([run.name for run in runs])
    if shared:
        return _without_agent(shared, runs[0])
    methods = {str(row["method"]) for run in runs for row in run.results if not str(row["method"]).startswith("base")}
    return methods.pop() if len(methods) == 1 else f"{runs[0].name} and {len(runs) - 1} more"


def _without_agent(name: str, run: Run) -> str:
    """`grpo` of `grpo-gemma`, so that it has one name, and one colour, beside the figures of every agent."""
    return name.removesuffix(f"-{run.learners[0]}") or name if len(run.learners) == 1 else name


def _identity(config: Row) -> str:
    return json.dumps(_compared(config), sort_keys=True, default=str)


def _compared(config: Row) -> dict[str, Any]:
    """The keys by path that tell arms apart."""
    flat = {path: value for path, value in _flat(config).items()
            if not any(fnmatchcase(path, pattern) for pattern in _NOT_COMPARED)}  # fmt: skip
    data = {path: value for path, value in flat.items() if path.startswith("data.") and isinstance(value, str)}
    return flat | {path: _without_seed(value, config.get("seed")) for path, value in data.items()}


def _without_seed(source: str, seed: Any) -> str:
    """A source of questions, the seed in its name left open: a folder of that number, `seed2`, or the end of a name.

    >>> [_without_seed(s, 2) for s in ("p-2/2/train.jsonl", "p/train-seed2.jsonl", "p2/test_2.jsonl", "openai/gsm8k")]
    ['p-2/SEED/train.jsonl', 'p/train-seedSEED.jsonl', 'p2/test_SEED.jsonl', 'openai/gsm8k']
    """
    return re.sub(rf"(?<=/){seed}(?=/)|(?<=seed){seed}(?=/|\.)|(?<=[-_.]){seed}(?=\.\w+$)", "SEED", source)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = mapping(value)
        flat |= _flat(nested, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
