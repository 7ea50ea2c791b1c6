"""What a checkpoint costs the step beside which it is written, on one GPU.

    ilr-fast bench step_checkpoint        # one NVIDIA GPU with vLLM, 20 GB of disk; about two minutes

The training loop itself (`step_case.py`), `bench step`'s work with forced lengths, four steps, saved every second one.
The second runs alone. The third runs while the second's weights and moments are copied to the host; its update waits
for the copies, and files, hashes and flush go on beside it and beside the fourth step, whose own checkpoint waits until
the first stands (its phase `checkpoint`, left out of its time). The file system is that of the temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

from ilr_benchmarks.common import row
from ilr_benchmarks.step_runs import FULL, QWEN, SMALL, asked, failed, parts, run_case, total


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Three rows; one that says how the run failed, if it did."""
    load = SMALL if quick else FULL
    shape = f"Qwen2 1.5B, {load['questions']} questions × {load['samples']} samples"
    with tempfile.TemporaryDirectory() as folder:
        told = asked({"ada": QWEN}, ["forced"] * 4, load, folder, device, quick=quick,
                     context=512 if quick else 2304, cache_gib=8.75)  # fmt: skip
        lines = run_case("step_case", told | {"checkpoint_every": 2})
    if what := failed(lines):
        yield row("GRPO beside a checkpoint", shape, [], status=f"wrong: {what}")
        return
    _, alone, beside, after = [line for line in lines if "step" in line]
    yield row("GRPO", shape, [total(alone)], **parts([alone]))
    yield row("GRPO beside a checkpoint", shape, [total(beside)], limit_seconds=total(alone), **parts([beside]))
    seconds = total(after) - (after["seconds"]["checkpoint"] or 0.0)
    yield row("GRPO, the step after", shape, [seconds], limit_seconds=total(alone), **parts([after]))
