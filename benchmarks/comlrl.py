"""A step of two agents beside CoMLRL 1.4.3's, the one other library that trains several LLMs in one process.

    ilr-fast bench comlrl        # with CoMLRL (and datasets) installed: one NVIDIA GPU with vLLM, some minutes
    ilr-fast bench comlrl_cpu    # the same on the CPU, less of it

Two models of SmolLM2-135M's shape with random weights, both trained. The same number of turns and tokens: CoMLRL's tree
of 3 first and 9 second turns for each question and agent, ours of 4 dialogues of three turns (on the CPU 2 and 4, and 2
dialogues). All turns have the forced length. CoMLRL generates with transformers, question by question
(`comlrl_case.py`); ours is the training loop itself (`step_case.py`), with vLLM on a GPU and the embedded engine on the
CPU. Both take one step to warm up.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from ilr_benchmarks.common import row
from ilr_benchmarks.step_runs import asked, failed, memory, parts, run_case, total

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = {"cuda": 10.0, "cpu": 3.0}
LOADS = {  # branches + branches² turns for a question, and 3 × samples
    "cuda": {"questions": 4, "forced": 64, "branches": 3, "samples": 4},
    "cpu": {"questions": 1, "forced": 16, "branches": 2, "samples": 2},
}


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows of ours and theirs, and the ratio."""
    load = {**LOADS[device], "mean": 8, "most": LOADS[device]["forced"] + 1}
    load |= {"forced": 6, "most": 7} if quick else {}
    turns = 2 * 3 * load["samples"] * load["questions"]
    shape = f"two of SmolLM2-135M's shape, {turns} turns of {load['forced']} tokens"
    kinds = ["forced" if device == "cuda" else "short", *["forced"] * min(rounds, 2)]  # the first warms up
    with tempfile.TemporaryDirectory() as folder:
        told = asked({"ada": SMOLLM2, "bob": SMOLLM2}, kinds, load, folder, device,
                     quick=quick, context=1024, cache_gib=2.0)  # fmt: skip
        ours = run_case("step_case", {**told, "loss": {}})
    if what := failed(ours):
        yield row("ilr-fast", shape, [], status=f"wrong: {what}")
        return
    steps = [line for line in ours if "step" in line][1:]
    seconds = [total(s) for s in steps]
    yield row("ilr-fast", shape, seconds, memory_gib=memory(steps), **parts(steps))
    if only_ours or importlib.util.find_spec("comlrl") is None:
        return
    yield from _theirs({**load, "quick": quick}, shape, seconds, TARGETS[device])


def _theirs(load: Mapping[str, int], shape: str, seconds: list[float], target: float) -> Iterator[dict[str, Any]]:
    lines = run_case("comlrl_case", {**load, "shape": SMOLLM2})
    if what := failed(lines):
        yield row("CoMLRL", shape, [], status=what)
        return
    (found,) = lines
    yield row("CoMLRL", shape, [found["seconds"]], phases={k: found[k] for k in ("generate", "update")},
              memory_gib=found["memory_gib"])  # fmt: skip
    times = found["seconds"] / sorted(seconds)[len(seconds) // 2]
    yield row("ilr-fast beside CoMLRL", shape, seconds, limit_seconds=found["seconds"], times=times,
              met=times >= target, target=f"{times:.1f} times as fast, wanted ≥ {target:g}")  # fmt: skip
