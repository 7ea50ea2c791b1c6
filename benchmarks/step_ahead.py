"""Whether a step is faster where the next one's dialogues are sampled while the agent learns, on one GPU.

    ilr-fast bench step_ahead        # one NVIDIA GPU with vLLM; about two minutes

The training loop itself (`step_case.py`), half of `bench step`'s work with forced lengths, the engine on a copy of the
weights, with `rollout.ahead` and without, each in a process of its own. In each step that is counted one rollout is
sampled and one is learned from: not in the first with `ahead`, which samples two, nor in the last, which samples none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from statistics import median
from typing import Any

from ilr_benchmarks.common import row
from ilr_benchmarks.step_runs import FULL, QWEN, SMALL, asked, failed, memory, parts, run_case, total

STEPS = 5


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """A row without `ahead`, one with it; one that says how a run failed, if it did."""
    load = SMALL if quick else {**FULL, "questions": FULL["questions"] // 2}
    load = {**load, "most": load["forced"]}
    shape = f"Qwen2 1.5B, {load['questions']} questions × {load['samples']} samples, forced lengths"
    alone = None
    for ahead in (False, True):
        name = "GRPO, a step ahead" if ahead else "GRPO, the engine on a copy"
        with tempfile.TemporaryDirectory() as folder:
            told = asked({"ada": QWEN}, ["forced"] * STEPS, load, folder, device, quick=quick,
                         context=512 if quick else 768, cache_gib=0.1 if quick else 6)  # fmt: skip
            own = {"name": "vllm", "weights": "copy", "sleep": "never", "cache_gib": 0.1 if quick else 6}
            told["agent"]["engine"] |= own
            lines = run_case("step_case", told | {"ahead": ahead, "loss": {"importance": "token"}})
        if what := failed(lines):
            yield row(name, shape, [], status=f"wrong: {what}")
            return
        _, *steps, _ = [line for line in lines if "step" in line]
        seconds = list(map(total, steps))
        yield row(name, shape, seconds, memory_gib=memory(steps), limit_seconds=alone, **parts(steps))
        alone = median(seconds)
