"""Compiles every Triton kernel ahead of time for four architectures and reads the register spills from ptxas.

Needs Triton and this repository's kernel sources, neither a GPU nor, as far as Triton allows, PyTorch. In a process of
its own, since Triton's interpreter and its compiler cannot share one:

    python tests/kernels_aot.py            # one line a kernel, case and architecture; status 1 where something spills
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 86, 89, 90)
FLOATS = ("bf16", "fp32")


class Case(NamedTuple):
    """One specialization of a kernel: its Triton signature by argument, and the values of its constants."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int


def import_kernels(module: str) -> Any:
    """A kernel module, from the installed package or, without one, from this checkout."""
    try:
        return importlib.import_module(f"ilr_kernels.{module}")
    except ModuleNotFoundError:
        package = Path(tempfile.mkdtemp()) / "ilr_kernels"
        package.symlink_to(ROOT / "kernels", target_is_directory=True)
        sys.path.insert(0, str(package.parent))
        importlib.invalidate_caches()
        return importlib.import_module(f"ilr_kernels.{module}")


def case(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> Case:
    """A case with every argument of the kernel accounted for: typed, or constant (None for a pointer left out)."""
    arguments = kernel.arg_names
    signature = {a: types[a] if a in types and a not in constants else "constexpr" for a in arguments}
    missing = [a for a in arguments if signature[a] == "constexpr" and a not in constants]
    assert not missing, f"{name}: {missing} have neither type nor value"
    return Case(name, kernel, signature, constants, warps)


def lm_head_cases() -> Iterator[Case]:
    """The pass over the logits: every step, both dtypes, each variant of the loss at least once."""
    kernel = import_kernels("lm_head_kernel").rows_kernel
    vectors = ("p_logp", "p_entropy", "p_dlogp", "p_dentropy", "p_weight", "p_advantage", "p_old", "p_ref")
    vectors += ("p_behavior", "p_value", "p_clipped", "p_kl", "p_truncated")
    scalars = ("softcap", "temperature", "clip_low", "clip_high", "dual_clip", "importance_cap", "beta", "entropy_coef")
    base = {"OBJECTIVE": "ppo", "DUAL_CLIP": False, "KL": "k3", "IMPORTANCE_MODE": "truncate", "SOFTCAP": False}
    on_policy = {"p_old": None, "p_ref": None, "p_behavior": None}
    policy = {"STEP": "policy", "GRADIENT": True, "p_dentropy": None}
    steps: dict[str, dict[str, Any]] = {
        "statistics": {"STEP": "statistics", "GRADIENT": False, **dict.fromkeys(vectors[2:])},
        "given": {"STEP": "given", "GRADIENT": True, **dict.fromkeys(vectors[4:])},
        "given-no-entropy": {"STEP": "given", "GRADIENT": True, **dict.fromkeys(vectors[3:])},
        "policy-on-policy": {**policy, **on_policy},
        "policy-forward": {**policy, **on_policy, "GRADIENT": False},
        "policy-all-truncate-k3-dual": {**policy, "DUAL_CLIP": True},
        "policy-all-mask-k2": {**policy, "KL": "k2", "IMPORTANCE_MODE": "mask"},
        "policy-behavior-only": {**policy, "p_old": None},
        "policy-cispo-softcap": {**policy, "OBJECTIVE": "cispo", "SOFTCAP": True},
    }
    for dtype in FLOATS:
        types = {"p_logits": f"*{dtype}", "p_target": "*i64", **dict.fromkeys(vectors, "*fp32")}
        types |= {"first_row": "i32", "vocabulary": "i32", "stride": "i32", **dict.fromkeys(scalars, "fp32")}
        for name, constants in steps.items():
            yield case(f"rows_kernel {name} {dtype}", kernel, types, base | constants | {"BLOCK_V": 4096}, warps=8)


def advantage_cases() -> Iterator[Case]:
    """The advantage: every calibration and normalization, with and without a mask, a small and a large group."""
    module = import_kernels("advantage_kernel")
    types = {"p_reward": "*fp32", "p_mask": "*u8", "p_calibrated": "*fp32", "p_advantage": "*fp32"}
    types |= {"agents": "i32", "questions": "i32", "samples": "i32", "calibrate_weight": "fp32", "eps": "fp32"}
    for calibrate, normalize, block, masked in (
        ("reward", "grpo", 16, True),
        ("advantage", "dr_grpo", 64, False),
        ("none", "rloo", 64, True),
        ("advantage", "grpo", 4096, True),
    ):
        constants = {"CALIBRATE": calibrate, "NORMALIZE": normalize, "BLOCK_G": block}
        constants |= {} if masked else {"p_mask": None}
        name = f"advantage_kernel {calibrate} {normalize} {block}"
        yield case(name, module.advantage_kernel, types, constants, module.warps(block))


def compile_ptx(case: Case, architecture: int) -> str:
    """The PTX of a case."""
    from triton.compiler import ASTSource

    source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constants)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": case.warps, "enable_fp_fusion": True}).asm["ptx"]


def ptxas_report(ptx: str, architecture: int) -> dict[str, int]:
    """Registers and spilled bytes, as the ptxas that Triton would use states them."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert target is not None, "PTX without a target"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            get_ptxas(architecture).path,
            "-v",
            f"--gpu-name={target.group(1)}",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {
        "registers": re.search(r"Used (\d+) registers", done.stderr),
        "stores": re.search(r"(\d+) bytes spill stores", done.stderr),
        "loads": re.search(r"(\d+) bytes spill loads", done.stderr),
    }
    return {name: int(match.group(1)) for name, match in found.items() if match is not None}


def all_kernels() -> set[str]:
    """The names of the kernels that are launched: what the sources call `…_kernel` under @triton.jit."""
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    return {name for s in sources for name in re.findall(r"@triton\.jit[^\n]*\ndef (\w+_kernel)\(", s)}


def main() -> int:
    """Compiles every case for every architecture; 0 where nothing spills."""
    cases = [*advantage_cases(), *lm_head_cases()]
    forgotten = all_kernels() - {c.kernel.__name__ for c in cases}
    assert not forgotten, f"kernels without a case: {forgotten}"
    spilling = 0
    for c in cases:
        for architecture in ARCHITECTURES:
            report = ptxas_report(compile_ptx(c, architecture), architecture)
            assert set(report) == {"registers", "stores", "loads"}, f"ptxas said something else: {report}"
            spills = report["stores"] + report["loads"] > 0
            spilling += spills
            print(f"sm_{architecture} {report['registers']:4d} registers {'SPILLS' if spills else 'ok':6s} {c.name}")
    print(f"triton {triton.__version__}: {len(cases) * len(ARCHITECTURES)} compiled, {spilling} with spills")
    return 1 if spilling else 0


if __name__ == "__main__":
    raise SystemExit(main())
