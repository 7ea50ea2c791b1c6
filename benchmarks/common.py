"""Writes benchmark results: benchmarks/results/<name>.json with where, with what and how they were measured.

    write_results("lm_head_cpu", [row("ours", "N=4096 D=640 V=262144 float32", [0.91, 0.93])], "pytest benchmarks/…")

A row's `ms` is the median; `limit_ms` the time of what bounds the work, measured in the same run, and `over_limit` the
ratio to it; `error` is found before any time is taken; what was not measured is null.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "vllm", "numpy")


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


def write_results(name: str, rows: Sequence[Mapping[str, Any]], command: str) -> Path:
    """Writes the rows with device, driver, versions, commit, date and command; returns the file's path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**environment(), "command": command, "rows": list(rows)}, indent=1) + "\n")
    return path


def environment() -> dict[str, Any]:
    """Device, driver (null without a GPU), versions, commit (with `+` where files differ from it) and date (UTC)."""
    return {
        "device": _device(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"CPU {model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    commit = _output("git", "rev-parse", "--short", "HEAD")
    return commit and commit + ("+" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def _output(*command: str) -> str | None:
    """The first line a command prints, None where it is missing, fails or says nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
