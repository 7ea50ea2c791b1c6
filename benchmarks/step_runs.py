"""What the benchmarks of whole steps share: runs in processes of their own, and what their lines say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

QWEN, LLAMA = "Qwen/Qwen2.5-1.5B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"
FULL = {"questions": 32, "samples": 16, "forced": 512, "mean": 300, "most": 2048}
SMALL = {"questions": 2, "samples": 3, "forced": 12, "mean": 8, "most": 40}
OPTIMIZER = {"lr": 1e-6, "rounding": "stochastic", "moments": "bfloat16"}
Lines = Sequence[Mapping[str, Any]]


def asked(
    agents: Mapping[str, str], kinds: Sequence[str], load: Mapping[str, int], folder: str, device: str, *,
    quick: bool, context: int, cache_gib: float,
) -> dict[str, Any]:  # fmt: skip
    """What step_case.py is told. `agents` are Hub names by agent, `kinds` the steps', `load` as SMALL."""
    engine: dict[str, Any] = {"slots": load["questions"] * load["samples"], "max_context": context}
    if device == "cuda":
        engine |= {"name": "vllm", "sleep": "cache", "cache_gib": cache_gib}
    agent = {"engine": engine, "micro_batch_tokens": 256 if quick else 4096}
    agent |= {"optimizer": OPTIMIZER} if device == "cuda" else {"dtype": "float32"}
    return {"agents": dict(agents), "kinds": list(kinds), **load, "quick": quick, "folder": folder, "agent": agent}


def run_case(module: str, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of JSON that a module's run in a process of its own prints; the last says how it failed, if it did."""
    return list(case_lines(module, told))


def case_lines(module: str, told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same lines as they come."""
    command = [sys.executable, "-m", f"ilr_benchmarks.{module}", json.dumps(told)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith('{"'):  # TRL prints dictionaries too, of Python's form
                yield json.loads(line)
    if process.returncode != 0:
        yield {"failed": f"exit status {process.returncode}"}


def failed(lines: Lines) -> str | None:
    """How a run failed, None if it did not."""
    return next((line["failed"] for line in lines if "failed" in line), None)


def total(step: Mapping[str, Any]) -> float:
    """Seconds of a step; what validates after the last one is none of it."""
    return step["seconds"]["total"] - (step["seconds"]["evaluate"] or 0.0)


def overhead(step: Mapping[str, Any]) -> float:
    """Seconds of a step outside generation and training."""
    return total(step) - step["seconds"]["generate"] - step["seconds"]["train"]


def memory(steps: Lines) -> float | None:
    """The most that all processes held of the card, in GiB; None without a card."""
    return max((s["memory_gib"] or 0.0 for s in steps), default=0.0) or None


def parts(steps: Lines) -> dict[str, Any]:
    """Medians of the phases' seconds, of the tokens, and what the last step's agents report."""
    names = [name for name in steps[0]["seconds"] if steps[0]["seconds"][name] is not None]
    phases = {name: median(s["seconds"][name] or 0.0 for s in steps) for name in names}
    tokens = {name: median(s["tokens"][name] for s in steps) for name in ("prompt", "generated", "trained")}
    return {"phases": phases, "tokens": tokens, "agents": steps[-1]["agents"]}
