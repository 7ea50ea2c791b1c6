"""The policy loss with both gradients on the CPU, beside its three matrix products and plain PyTorch.

    ilr-fast bench lm_head_cpu        # writes benchmarks/results/lm_head_cpu.json; 14 GiB, minutes

N = 4,096 tokens, hidden size 640, vocabulary 262,144 (Gemma-3-270M) in float32. Plain PyTorch is measured at 512 rows,
beside the products of that size: at 4,096 its logits and their copies alone would take 16 GiB. `extra_gib` is the peak
resident size of a process of its own that makes one call, beyond inputs and gradients (of the products: beyond inputs
and their results). `products_share` is the matrix products' part of the time; `over_limit_min` takes the least times,
which others' work on the machine moves less.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ilr_benchmarks.lm_head import GRPO, Products, Size, Truth, loss, make, name_of, release
from ilr_benchmarks.measure import Case, measure
from ilr_benchmarks.problem import Problem
from ilr_kernels import reference

SIZE, PLAIN_ROWS, QUICK = (4096, 640, 262144), 512, (64, 32, 1000)
LIMIT, OURS, INTO, PLAIN = "three products", "ours", "ours, into weight.grad", "plain PyTorch"
ZERO = "zero the gradient"
TOLERANCE = 1e-4
FORGET_PEAK = Path("/proc/self/clear_refs")


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> list[dict[str, Any]]:
    """Rows at all rows, and at few rows with plain PyTorch; at most three rounds. A quick run asks one process alone
    for its memory."""
    n, d, v = QUICK if quick else SIZE
    few = min(n // 2, PLAIN_ROWS)
    rows = _run((n, d, v), (LIMIT, OURS, INTO), "", min(rounds, 3), (OURS,) if quick else (LIMIT, OURS, INTO))
    if not only_ours:
        names = (LIMIT, PLAIN, OURS)
        rows += _run((few, d, v), names, f", {few} rows", min(rounds, 3), () if quick else names)
    return rows


def _run(
    size: Size, names: Sequence[str], suffix: str, rounds: int, with_memory: Sequence[str]
) -> list[dict[str, Any]]:
    x = make(size, "cpu")
    truth, works = Truth(x, GRPO), variants(x)
    cases = []
    for name in names:
        memory = partial(extra_gib, name, size) if name in with_memory else None
        if name == LIMIT:
            cases.append(Case(name + suffix, works[name], memory=memory))
            continue
        prepare = works[ZERO] if name == INTO else None
        limit = LIMIT + suffix
        cases.append(Case(name + suffix, works[name], truth.error(), TOLERANCE, limit, memory=memory, prepare=prepare))
    rows = measure(cases, name_of(x), rounds, "cpu")
    for row in rows:
        row["products_share"] = 1 / row["over_limit"] if row["over_limit"] else None
        row["over_limit_min"] = row["ms_min"] / rows[0]["ms_min"] if row["ms_min"] else None
    release("cpu")
    return rows


def variants(x: Problem) -> dict[str, Callable[[], Any]]:
    """One call of each by its name, and what makes the gradient that is added to zero again."""
    into_VD = torch.zeros_like(x.weight_VD, requires_grad=False)
    return {
        LIMIT: Products(x).whole,
        OURS: lambda: loss(x),
        INTO: lambda: loss(x, weight_grad_VD=into_VD),
        PLAIN: lambda: loss(x, reference),
        ZERO: into_VD.zero_,
    }


def extra_gib(name: str, size: Size) -> float | None:
    """GiB that a call adds to the resident size at its peak, in its own process; None where /proc does not tell."""
    if not FORGET_PEAK.exists():
        return None
    command = [sys.executable, "-m", "ilr_benchmarks.lm_head_cpu", name, *map(str, size)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def _measure_memory(name: str, size: Size) -> float:
    """The peak of the first call at this size, after one at 16 rows for the libraries' own buffers."""
    variants(make((16, *size[1:]), "cpu"))[name]()
    x = make(size, "cpu")
    work = variants(x)[name] if name != LIMIT else lambda: Products(x).whole()
    gradients = x.hidden_ND.nbytes + (x.weight_VD.nbytes if name != INTO else 0)
    FORGET_PEAK.write_text("5")
    before = _resident("VmRSS")
    work()
    return max(0.0, _resident("VmHWM") - before - gradients / 2**30)


if __name__ == "__main__":
    rows_N, hidden_D, vocabulary_V = map(int, sys.argv[2:])
    print(_measure_memory(sys.argv[1], (rows_N, hidden_D, vocabulary_V)))
