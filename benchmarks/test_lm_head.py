"""Log-prob and policy loss with both gradients on the CPU, beside its three matrix products and plain PyTorch.

    pytest benchmarks/test_lm_head.py -s            # writes benchmarks/results/lm_head_cpu_memory.json

N = 4,096 tokens, hidden size 640, vocabulary 262,144 (Gemma-3-270M) in float32; ILR_BENCH_ROWS and ILR_BENCH_ROUNDS
change the rows and how often each variant is timed. Rounds are interleaved, errors are found first, and each variant's
extra memory is its own process's peak resident size less what it held before. Plain PyTorch is measured at 512 rows,
beside the products of that size: at 4,096 its logits and their copies alone would take 16 GiB.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import row, write_results
from ilr_kernels import reference
from ilr_kernels.lm_head import linear_policy_loss
from torch import Tensor

ROWS = int(os.environ.get("ILR_BENCH_ROWS", "4096"))
ROUNDS = int(os.environ.get("ILR_BENCH_ROUNDS", "3"))
PLAIN_ROWS = min(ROWS, 512)
HIDDEN, VOCABULARY = 640, 262144
COMMAND = "pytest benchmarks/test_lm_head.py -s"


def make(rows: int) -> dict[str, Tensor]:
    """Arguments of the loss: peaked distributions, an advantage and a weight for every token."""
    torch.manual_seed(0)
    return {
        "hidden_TD": torch.randn(rows, HIDDEN).requires_grad_(),
        "weight_VD": (torch.randn(VOCABULARY, HIDDEN) * 3 / HIDDEN**0.5).requires_grad_(),
        "target_T": torch.randint(VOCABULARY, (rows,)),
        "advantage_T": torch.randn(rows),
        "token_weight_T": torch.rand(rows) / rows,
    }


def ours(x: dict[str, Tensor]) -> None:
    """The fused loss; dweight is a new tensor."""
    x["hidden_TD"].grad = x["weight_VD"].grad = None
    linear_policy_loss(**x)[0].backward()


def ours_into_buffer(x: dict[str, Tensor]) -> None:
    """The fused loss; dweight is added to the parameter's own gradient."""
    x["hidden_TD"].grad = None
    if x["weight_VD"].grad is None:
        x["weight_VD"].grad = torch.zeros_like(x["weight_VD"])
    linear_policy_loss(**x, weight_grad_VD=x["weight_VD"].grad)[0].backward()


def products(x: dict[str, Tensor]) -> None:
    """The limit: logits, dhidden and dweight as three whole products."""
    with torch.no_grad():
        logits_TV = x["hidden_TD"] @ x["weight_VD"].t()
        _ = logits_TV @ x["weight_VD"], logits_TV.t() @ x["hidden_TD"]


def plain(x: dict[str, Tensor]) -> None:
    """Plain PyTorch: whole logits and autograd."""
    x["hidden_TD"].grad = x["weight_VD"].grad = None
    reference.linear_policy_loss(**x)[0].backward()


VARIANTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], int]] = {
    "three products": (products, ROWS),
    "ours": (ours, ROWS),
    "ours, into weight.grad": (ours_into_buffer, ROWS),
    f"three products, {PLAIN_ROWS} rows": (products, PLAIN_ROWS),
    f"plain PyTorch, {PLAIN_ROWS} rows": (plain, PLAIN_ROWS),
    f"ours, {PLAIN_ROWS} rows": (ours, PLAIN_ROWS),
}


def test_lm_head_cpu() -> None:
    """Errors, then times in interleaved rounds, then each variant's memory in a process of its own."""
    errors = {"ours": error(ours), "ours, into weight.grad": error(ours_into_buffer), "plain PyTorch": error(plain)}
    assert max(errors.values()) < 1e-4, errors
    seconds = measure()
    memory = {name: extra_memory(name) for name in VARIANTS}
    rows = []
    for name, (_, n) in VARIANTS.items():
        limit = min(seconds["three products" if n == ROWS else f"three products, {PLAIN_ROWS} rows"])
        known = errors.get(name.removesuffix(f", {PLAIN_ROWS} rows"))
        shape = f"N={n} D={HIDDEN} V={VOCABULARY} float32"
        rows.append(row(name, shape, seconds[name], extra_gib=memory[name], error=known, limit_seconds=limit))
        # the least time stands in for a quiet machine: others' work only ever adds
        rows[-1]["over_limit_min"] = min(seconds[name]) / limit
        print("{variant:28s} {ms_min:9.0f} ms least {ms:9.0f} median {extra_gib:6.2f} GiB".format(**rows[-1]), end="")
        print(f"  {rows[-1]['over_limit_min']:.3f} of the limit (least)  error {known}")
    write_results("lm_head_cpu_memory", rows, COMMAND)


def error(variant: Callable[[dict[str, Tensor]], None]) -> float:
    """The larger relative error of the two gradients against float64, on 48 rows of the same width."""
    x = make(48)
    variant(x)
    exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in x.items()}
    leaves = [exact[k].requires_grad_() for k in ("hidden_TD", "weight_VD")]
    reference.linear_policy_loss(**exact)[0].backward()
    found = (x["hidden_TD"].grad, x["weight_VD"].grad)
    return max(
        float((f - leaf.grad).abs().max() / leaf.grad.abs().max()) for f, leaf in zip(found, leaves, strict=True)
    )


def measure() -> dict[str, list[float]]:
    """Seconds of every variant, in interleaved rounds after one warm-up of 64 rows."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for variant, _ in VARIANTS.values():
        variant(make(64))
    for _ in range(ROUNDS):
        for name, (variant, n) in VARIANTS.items():
            x = make(n)
            x["weight_VD"].grad = torch.zeros_like(x["weight_VD"]) if variant is ours_into_buffer else None
            start = time.perf_counter()
            variant(x)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def extra_memory(name: str) -> float:
    """GiB that a variant adds to the resident size at its peak, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    return float(done.stdout)


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


if __name__ == "__main__":
    chosen, count = VARIANTS[sys.argv[1]]
    chosen(make(16))  # the libraries' own buffers
    arguments = make(count)
    if chosen is ours_into_buffer:
        arguments["weight_VD"].grad = torch.ones_like(arguments["weight_VD"])
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS")
    chosen(arguments)
    print(resident("VmHWM") - before)
