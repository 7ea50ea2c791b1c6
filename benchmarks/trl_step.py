"""TRL's GRPO step by itself: the rows that `bench step` sets beside ours (`step_trl.py` is what runs).

    ilr-fast bench trl_step --rounds 1        # one NVIDIA GPU with vLLM and TRL 1.16; the first so many settings
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from ilr_benchmarks.common import row
from ilr_benchmarks.step_runs import FULL, QWEN, SMALL, Lines, case_lines, failed, memory

SETTINGS: list[dict[str, Any]] = [  # Liger changes the model for good and comes last; its second if its first fails
    {"micro_batch": 32, "checkpointing": False},
    {"micro_batch": 64, "checkpointing": False, "liger": True},
    {"micro_batch": 32, "checkpointing": False, "liger": True},
]
WHOLE_GIB = 120  # with less, half the micro-batches: 32 of this shape without Liger's layers take 68 GiB beside vLLM
VLLM = 0.2  # of the memory: 16 GiB of an H100, keys and values of all 512 sequences included


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """TRL's rows for the first `rounds` settings."""
    return trl_rows(SMALL if quick else FULL, quick, rounds)


def trl_rows(load: Mapping[str, int], quick: bool, most: int | None = None) -> Iterator[dict[str, Any]]:
    """A row for each setting as it ends, its second step timed; a status alone where TRL is missing or it fails."""
    shape = f"Qwen2 1.5B, {load['questions']} questions × {load['samples']} samples"
    if importlib.util.find_spec("trl") is None:
        yield row("TRL", shape, [], status="trl is not installed")
        return
    settings = [{**s, "micro_batch": 3} for s in SETTINGS[:1]] if quick else _fitting(SETTINGS[:most])
    with tempfile.TemporaryDirectory() as folder:
        told = {"shape": QWEN, "settings": settings, **load, "steps": 2, "quick": quick, "context": 1024,
                "utilization": VLLM}  # fmt: skip
        lines: list[dict[str, Any]] = []
        for line in case_lines("step_trl", told | {"folder": folder}):
            lines.append(line)
            if line.get("ended"):
                yield _row([told for told in lines if told.get("setting") == line["setting"]], shape)
        if what := failed([line for line in lines if "setting" not in line]):
            yield row("TRL", shape, [], status=what)


def _row(lines: Lines, shape: str) -> dict[str, Any]:
    """A setting's."""
    name = "TRL, " + ", ".join(f"{key} {value}" for key, value in lines[0]["setting"].items())
    steps = [line for line in lines if "step" in line]
    if len(steps) < 2:
        return row(name, shape, [], status=failed(lines) or "no step")
    logs = [line["logs"] for line in lines if "logs" in line][-1:]
    return row(name, shape, [s["seconds"] for s in steps[1:]], first_ms=1e3 * steps[0]["seconds"],
               memory_gib=memory(steps), logs=logs)  # fmt: skip


def _fitting(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the micro-batches that a card of this size has room for."""
    whole = torch.cuda.is_available() and torch.cuda.mem_get_info()[1] >= WHOLE_GIB * 2**30
    return [{**s, "micro_batch": s["micro_batch"] // (1 if whole else 2)} for s in settings]
