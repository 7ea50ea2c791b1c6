"""The plan's memory against the card's, phase by phase, for runs on a card whose memory but for 22 GiB a ballast holds.

    ilr-fast bench memory                                     # one NVIDIA GPU; the ballast makes it a card of 22 GiB
    ILR_MEMORY_CASES="QLoRA;3B" ilr-fast bench memory        # those whose name has one of these in it

True shapes with random weights (shapes.py), the vetted configs' own keys, few questions. Each run is a process of its
own: it loads its agents as training does, generates from prompts that leave room for some tokens, and updates on
sequences as long as the context; NVML's peak of each phase, all processes together, stands beside the plan's. A run
that needs more than the card has fails, as on a small card; one that takes too long is ended, and the next one begun.

    variant     the config, and the phase          planned_gib, measured_gib     ratio = planned / measured
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from ilr_benchmarks.ballast import ballast
from ilr_benchmarks.common import row

ROOT = Path(__file__).resolve().parents[1]
CARD = 22.0  # GiB
WITHIN = 0.1
SHAPE = f"a card of {CARD:g} GiB (ballast), true shapes with random weights"


class Case(NamedTuple):
    """A config, the sequences of an agent's update, the tokens of each request, and the seconds that it may take."""

    config: str
    sequences: int
    tokens: int
    limit: int = 110


CASES = {
    "GRPO, 8B, LoRA, 8,192 tokens": Case("24gb/grpo_8b_lora.yaml", 4, 16),
    "ILR, 8B and 7B, QLoRA": Case("24gb/ilr_8b_7b_qlora.yaml", 8, 24),
    "ILR, 8B and 7B, LoRA, by turns": Case("24gb/ilr_8b_7b_lora.yaml", 8, 24),
    "ILR, 1.5B and 1.7B, full": Case("24gb/ilr_two_1.5b_full.yaml", 8, 24),
    "GRPO, 3B, full": Case("24gb/grpo_3b_full.yaml", 8, 24),
}


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows by run and phase; a run that fails has a row that says how. `quick`: small shapes, on the CPU."""
    wanted = [part for part in os.environ.get("ILR_MEMORY_CASES", "").split(";") if part]
    for name, case in CASES.items():
        if wanted and not any(part in name for part in wanted):
            continue
        with nullcontext() if device == "cpu" else ballast(CARD), tempfile.TemporaryDirectory() as folder:
            for found in _case(name, case, Path(folder), quick):
                print({k: v for k, v in found.items() if v is not None}, flush=True)
                yield found


def _case(name: str, case: Case, folder: Path, quick: bool) -> Iterator[dict[str, Any]]:
    asked = {
        "config": str(ROOT / "configs" / case.config), "folder": str(folder), "quick": quick, "gib": CARD,
        "sequences": case.sequences, "tokens": case.tokens,
    }  # fmt: skip
    command = ["timeout", str(case.limit), sys.executable, "-m", "ilr_benchmarks.memory_case", json.dumps(asked)]
    log = folder / "log"
    with log.open("w") as errors:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith("{"):
                yield _row(name, json.loads(line))
    said = log.read_text()
    print(said[-3000:], file=sys.stderr)
    if worker.wait() != 0:
        last = (said.strip().splitlines() or ["it ended"])[-1]
        why = f"it took more than {case.limit} s" if worker.returncode == 124 else last[:300]
        yield row(name, SHAPE, [], status=f"wrong: {why}")


def _row(name: str, told: dict[str, Any]) -> dict[str, Any]:
    """One phase's row; seconds are of one pass."""
    planned, measured = told.get("planned_gib"), told.get("measured_gib")
    ratio = planned / measured if planned and measured else None
    seconds = told.pop("seconds", None)
    return row(
        f"{name}: {told.pop('phase')}", SHAPE, [] if seconds is None else seconds, **told, ratio=ratio,
        target="within 10%", met=None if ratio is None else abs(ratio - 1) <= WITHIN,
    )  # fmt: skip
