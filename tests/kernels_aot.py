"""Compiles every Triton kernel ahead of time for each architecture and reads registers and spills from ptxas.

Shared memory must fit what a block may have on the card.

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
from kernels_aot_layers import layer_cases
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parent.parent
# Compute capability to the bytes of shared memory a block may have: A100, RTX 3090 and A10, RTX 4090 and L4, H100,
# B200, RTX 5090.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
FLOATS = ("bf16", "fp32")
ONE_REGISTER = 4  # bytes; kept across a barrier, once a row, which some ptxas do with 40 registers in use


class Case(NamedTuple):
    """One specialization of a kernel: its Triton signature by argument, and the values of its constants."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    divisible: tuple[str, ...] = ()  # arguments that are multiples of 16
    architectures: tuple[int, ...] = tuple(SHARED_MEMORY)
    registers: int | None = None  # a thread at launch, where the kernel shares them out itself


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


def case(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, **more: Any) -> Case:
    """A case with every argument of the kernel accounted for: typed, or constant (None for a pointer left out)."""
    arguments = kernel.arg_names
    signature = {a: types[a] if a in types and a not in constants else "constexpr" for a in arguments}
    missing = [a for a in arguments if signature[a] == "constexpr" and a not in constants]
    assert not missing, f"{name}: {missing} have neither type nor value"
    return Case(name, kernel, signature, {**constants}, warps, **more)


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
            constants = base | constants | {"BLOCK_V": 2048 if dtype == "bf16" else 1024}
            yield case(f"rows_kernel {name} {dtype}", kernel, types, constants, warps=8)


SOFTMAX_VECTORS = ("p_target_x", "p_shift", "p_others", "p_logp", "p_entropy", "p_total", "p_moment")
LOSS_VECTORS = ("p_dlogp", "p_dentropy", "p_weight", "p_advantage", "p_old", "p_ref", "p_behavior")
LOSS_VECTORS += ("p_value", "p_clipped", "p_kl", "p_truncated", "p_factor")


def product_cases() -> Iterator[Case]:
    """The product with the softmax inside, tiled as on each card, with and without the copy engine."""
    kernel = import_kernels("softmax_product_kernel").product_kernel
    card_plan = import_kernels("product_plan").card_plan
    types = {"p_bias": "*bf16", "p_target": "*i64", "p_needed": "*i32", "scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(SOFTMAX_VECTORS, "*fp32")
    types |= dict.fromkeys(("rows", "vocabulary", "depth", "hidden_stride", "weight_stride", "exps_stride"), "i32")
    plain = {"SOFTCAP": False, "SLOPE": True, "MOMENT": True, "PEAK": False, "WIDEN": False}
    variants: dict[str, dict[str, Any]] = {
        "loss": {"p_bias": None, "p_needed": None},
        "log-prob": {"p_bias": None, "p_needed": None, "exps": None},
        "everything": {"SOFTCAP": True},
        "peak": {"p_bias": None, "exps": None, "PEAK": True, "MOMENT": False},
    }
    for architecture, shared_memory in SHARED_MEMORY.items():
        for name, constants in variants.items():
            plan = card_plan(architecture, shared_memory, 132, depth=4096, softcap="SOFTCAP" in constants)
            tiles = {"TMA": plan.tma, "HALVES": plan.halves, "PROGRAMS": plan.programs, "GROUP": plan.group}
            tiles["FLATTEN"] = plan.flatten
            tiles |= {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k}
            width = plan.block_n // 2 if plan.halves else plan.block_n
            shapes = ((plan.block_m, plan.block_k), (plan.block_n, plan.block_k), (plan.block_m, width))
            operands = [f"tensordesc<bf16[{m},{n}]>" if plan.tma else "*bf16" for m, n in shapes]
            given = types | dict(zip(("hidden", "weight", "exps"), operands, strict=True))
            divisible = ("vocabulary", "depth", "hidden_stride", "weight_stride", "exps_stride")
            more = {"stages": plan.stages, "divisible": divisible, "architectures": (architecture,)}
            yield case(f"product_kernel {name}", kernel, given, plain | tiles | constants, plan.warps, **more)


def specialized_cases() -> Iterator[Case]:
    """The product whose groups of warps take roles, for Hopper."""
    module = import_kernels("softmax_product_gluon")
    plan = import_kernels("product_plan").card_plan(90, SHARED_MEMORY[90], 132, depth=4096, softcap=False)
    assert plan.specialized
    types = {"p_bias": "*bf16", "p_target": "*i64", "p_needed": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(SOFTMAX_VECTORS, "*fp32") | dict.fromkeys(("rows", "vocabulary", "depth"), "i32")
    blocks = {"hidden": (64, 64), "weight": (256, 64), "exps": (64, 64)}
    types |= {name: f"tensordesc<bf16[{m},{n}],{module.LAYOUT!r}>" for name, (m, n) in blocks.items()}
    tiles = {"GROUP": plan.group, "PROGRAMS": plan.programs, "STAGES": plan.stages}
    variants: dict[str, dict[str, Any]] = {
        "loss": {"MOMENT": True, "p_bias": None, "p_needed": None},
        "log-prob": {"MOMENT": False, "p_bias": None, "p_needed": None, "exps": None},
        "log-prob and entropy": {"MOMENT": True, "p_bias": None, "p_needed": None, "exps": None},
        "everything": {"MOMENT": True},
    }
    for name, constants in variants.items():
        more = {"divisible": ("vocabulary", "depth"), "architectures": (90,), "registers": module.REGISTERS}
        kernel = module.specialized_product_kernel
        yield case(f"specialized_product_kernel {name}", kernel, types, tiles | constants, plan.warps // 2, **more)


def softmax_cases() -> Iterator[Case]:
    """What stands around that product."""
    module, scaling = import_kernels("softmax_rows_kernel"), import_kernels("scaling_kernel")
    types = {"p_hidden": "*bf16", "p_weight": "*bf16", "p_bias": "*bf16", "p_exps": "*bf16", "p_more": "*bf16"}
    types |= dict.fromkeys(SOFTMAX_VECTORS, "*fp32") | {"p_redo": "*i32", "p_x": "*bf16", "p_target": "*i64"}
    types |= dict.fromkeys(("rows", "tiles", "vocabulary", "depth", "count"), "i32")
    types |= dict.fromkeys(("hidden_stride", "weight_stride", "exps_stride", "more_stride", "split"), "i32")
    scalars = ("softcap", "temperature", "clip_low", "clip_high", "dual_clip", "importance_cap", "beta", "entropy_coef")
    types |= dict.fromkeys(scalars, "fp32")
    loss = {"OBJECTIVE": "ppo", "DUAL_CLIP": True, "KL": "k3", "IMPORTANCE_MODE": "truncate", "SOFTCAP": True}
    counts = {"p_target": "*i64", "p_first": "*fp32", "p_second": "*fp32", "p_counts": "*i64", "p_go": "*i32"}
    counts |= {"rows": "i32", "vocabulary": "i32"}
    count_kernel = import_kernels("rows_kernel").count_kernel
    yield case("count_kernel", count_kernel, counts, {"IGNORED": -100, "BLOCK": 4096}, 16)
    sums = {**dict.fromkeys(LOSS_VECTORS + SOFTMAX_VECTORS, "*fp32"), "p_out": "*fp32", "rows": "i32"}
    yield case("stats_kernel", import_kernels("stats_kernel").stats_kernel, sums, {"BLOCK": 4096}, 16)
    block = {"BLOCK_R": 32, "BLOCK_T": 32}
    yield case("target_kernel", module.target_kernel, types, {"SOFTCAP": True, "BLOCK_D": 2048}, 4)
    yield case("peaks_kernel", module.peaks_kernel, types, block, 4)
    yield case("sums_kernel", module.sums_kernel, types, block | {"REDO": False}, 4)
    vectors = types | dict.fromkeys(LOSS_VECTORS, "*fp32")
    factors = {"STEP": "policy", "GRADIENT": True, "BLOCK_R": 128, **loss}
    yield case("factors_kernel", module.factors_kernel, vectors, factors | {"ENTROPY": True}, 4)
    k2 = {"ENTROPY": False, "KL": "k2", "p_more": None}
    yield case("factors_kernel k2", module.factors_kernel, vectors, factors | k2, 4)
    yield case("entropy_kernel", module.entropy_kernel, vectors, {"SOFTCAP": True, "BLOCK_V": 4096}, 8)
    rows = vectors | {"p_out": "*bf16", "stride": "i32", "columns": "i32"}
    summed = rows | {"p_total": "*fp32"}
    yield case("add_scaled_rows_kernel", scaling.add_scaled_rows_kernel, summed, {"BLOCK_R": 32, "BLOCK_C": 256}, 4)
    yield case("scale_rows_kernel", scaling.scale_rows_kernel, rows | {"p_x": "*fp32"}, {"BLOCK_D": 2048}, 4)
    yield case("scale_kernel", scaling.scale_kernel, vectors, {"PROGRAMS": 1056, "BLOCK": 4096}, 8)


def advantage_cases() -> Iterator[Case]:
    """The advantage: every calibration and normalization, with and without a mask, a small and a large group."""
    module = import_kernels("advantage_kernel")
    types = {"p_reward": "*fp32", "p_mask": "*i1", "p_calibrated": "*fp32", "p_advantage": "*fp32"}
    types |= {"questions": "i32", "calibrate_weight": "fp32", "eps": "fp32"}
    for calibrate, normalize, agents, samples, masked in (
        ("reward", "grpo", 2, 16, True),
        ("reward", "grpo", 3, 8, False),
        ("advantage", "dr_grpo", 8, 64, False),
        ("none", "rloo", 3, 64, True),
        ("advantage", "grpo", 2, 4096, True),
    ):
        blocks, warps = module.tiling(agents, samples)
        constants = {"CALIBRATE": calibrate, "NORMALIZE": normalize, "AGENTS": agents, "SAMPLES": samples, **blocks}
        constants |= {} if masked else {"p_mask": None}
        name = f"advantage_kernel {calibrate} {normalize} {agents} {samples}"
        yield case(name, module.advantage_kernel, types, constants, warps)


def adamw_cases() -> Iterator[Case]:
    """AdamW: every combination of dtypes that training makes."""
    kernel = import_kernels("adamw_kernel").adamw_kernel
    types = {"p_table": "*i64", "p_tensor": "*i32", "p_first": "*i32", "tensors": "i32", "seed": "i64"}
    scalars = ("lr", "beta1", "beta2", "eps", "weight_decay", "correction1", "correction2", "scale")
    types |= dict.fromkeys(scalars, "fp32")
    for weight, gradient, state in (("bf16", "bf16", "fp32"), ("bf16", "fp32", "bf16"), ("fp32", "fp32", "fp32")):
        given = {"p_weight": weight, "p_gradient": gradient, "p_mean": state, "p_square": state}
        constants = {"STOCHASTIC": weight == "bf16", "UNIT": 16, "BLOCK": 2048}
        pointers = {name: f"*{dtype}" for name, dtype in given.items()}
        yield case(f"adamw_kernel {weight} {gradient} {state}", kernel, types | pointers, constants, warps=8)


def compile_ptx(case: Case, architecture: int) -> tuple[str, int]:
    """The PTX of a case, and the bytes of shared memory it takes."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    position = {name: i for i, name in enumerate(case.kernel.arg_names)}
    pointers = [name for name, kind in case.signature.items() if kind.startswith("*")]
    divisible = {(position[name],): [["tt.divisibility", 16]] for name in (*pointers, *case.divisible)}
    make_source = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = make_source(fn=case.kernel, signature=case.signature, constexprs=case.constants, attrs=divisible)
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    if case.registers is not None:
        options["maxnreg"] = case.registers
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return made.asm["ptx"], made.metadata.shared


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
    """The names of the kernels that are launched: what the sources call `…_kernel` under @triton.jit or @gluon.jit."""
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    return {name for s in sources for name in re.findall(r"@(?:triton|gluon)\.jit[^\n]*\ndef (\w+_kernel)\(", s)}


def main() -> int:
    """Compiles every case for every architecture; 0 where nothing spills."""
    makers = (adamw_cases, advantage_cases, lm_head_cases, product_cases, specialized_cases, softmax_cases)
    cases = [*(c for make in makers for c in make()), *layer_cases(case, import_kernels)]
    forgotten = all_kernels() - {c.kernel.__name__ for c in cases}
    assert not forgotten, f"kernels without a case: {forgotten}"
    compiled = failing = 0
    for c in cases:
        for architecture in c.architectures:
            ptx, shared = compile_ptx(c, architecture)
            report = ptxas_report(ptx, architecture)
            assert set(report) == {"registers", "stores", "loads"}, f"ptxas said something else: {report}"
            groups = 1 if c.registers is None else 2  # of warps that multiply, each with its own copy of the code
            spills = max(report["stores"], report["loads"]) > ONE_REGISTER * groups
            too_large = shared > SHARED_MEMORY[architecture]
            compiled, failing = compiled + 1, failing + (spills or too_large)
            verdict = "SPILLS" if spills else "TOO LARGE" if too_large else "ok"
            print(f"sm_{architecture} {report['registers']:4d} registers {shared:7d} bytes {verdict:9s} {c.name}")
    print(f"triton {triton.__version__}: {compiled} compiled, {failing} with spills or too much shared memory")
    return 1 if failing else 0


if __name__ == "__main__":
    raise SystemExit(main())
