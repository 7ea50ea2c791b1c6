"""Where a run was made: device, driver, versions, commit, date and command. No environment variables, no secrets.

    environment("ilr-fast train configs/cpu/quickstart.yaml")["device"]  # "CPU AMD EPYC 7B13, 2 cores"
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("ilr-fast", "torch", "transformers", "triton", "peft", "safetensors", "numpy", "vllm", "math-verify",
            "reasoning-gym")


def environment(command: str) -> dict[str, Any]:
    """Plain values for JSON; what does not exist (driver, commit) is null. `commit` ends in + where files differ."""
    return {
        "device": _device(),
        "driver": _driver(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _driver() -> str | None:
    """NVIDIA's driver, from the kernel module's own file."""
    file = Path("/proc/driver/nvidia/version")
    if not file.exists():
        return None
    words = file.read_text().splitlines()[0].split()
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), None)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """The commit of the checkout that runs; null for an installed package."""
    commit = _git("rev-parse", "HEAD")
    return commit and commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20, cwd=root)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
