"""ILR's step with two agents on one GPU beside the agents' own generation and training, added up.

    ilr-fast bench step_agents        # one NVIDIA GPU with vLLM; about two minutes

The training loop itself (`step_case.py`): 16 questions × 16 dialogues of three stages between Qwen2's 1.5B and Llama
3.2's 1B shape with random weights, both trained, both engines in the process; turns of log-normal length, mean 200, at
most 512, others in every step. After the last step each agent generates as many turns of the same lengths alone, with
nobody to wait for; its own training is the time of its update. The target is 1.15 of their sum.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from ilr_benchmarks.common import row
from ilr_benchmarks.step_runs import LLAMA, QWEN, SMALL, Lines, asked, failed, memory, parts, run_case, total

ILR = 1.15  # the target
FULL = {"questions": 16, "samples": 16, "forced": 512, "mean": 200, "most": 512}
CACHE_GIB = 12.5


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """One row; it says how the run failed, if it did."""
    load = SMALL if quick else FULL
    agents = {"ada": QWEN, "bob": LLAMA}
    with tempfile.TemporaryDirectory() as folder:
        told = asked(agents, ["ragged"] * (1 + min(rounds, 3)), load, folder, device, quick=quick,
                     context=1024 if quick else 4096, cache_gib=CACHE_GIB)  # fmt: skip
        yield _row(run_case("step_case", told), load)


def _row(lines: Lines, load: Mapping[str, int]) -> dict[str, Any]:
    shape = f"Qwen2 1.5B and Llama 1B, {load['questions']} × {load['samples']} dialogues of three turns"
    if what := failed(lines):
        return row("ILR, two agents", shape, [], status=f"wrong: {what}")
    steps, alone = [line for line in lines if "step" in line], lines[-1]["end"]["generate_alone"]
    last = steps[-1]
    own = sum(alone.values()) + sum(last["train_seconds"].values())
    ratio = total(last) / own
    return row(
        "ILR, two agents", shape, [total(s) for s in steps[1:]], limit_seconds=own, ratio=ratio,
        last_ms=1e3 * total(last), generate_alone=alone, train_seconds=last["train_seconds"], **parts(steps[1:]),
        memory_gib=memory(steps), met=ratio <= ILR,
        target=f"{ratio:.3f} of the agents' own parts, wanted ≤ {ILR}",
    )  # fmt: skip
