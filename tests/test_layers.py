"""Imports go one way, lowest layer first; pure modules load neither torch nor transformers nor vllm.

A new module must be given its layer here. Imports are read from the source, those inside functions too; within a layer
they may go either way, but never in a circle.
"""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"ilr_fast": ROOT / "ilr_fast", "ilr_kernels": ROOT / "kernels", "ilr_benchmarks": ROOT / "benchmarks"}
HEAVY = {"torch", "transformers", "vllm", "peft", "triton"}

# Names below ilr_fast, lowest layer first.
LAYERS = {
    "words and records": """ilr_fast types errors own quoting tokenpieces statistics statistics_runs interrupt
        allocator background card durable parent ticks""",
    "what a run is made of": """ilr_kernels.* config config_* data benchmark_sets choices tasks tasks.* rewards
        rewards.* protocols protocols.* chat prompts models model_folder convert convert_* hub rows environment
        dialogue_rows transcripts""",
    "one agent": """engines engines.* attention flash_attention fused_layers fused_block fused_mlp products
        segments layer_graphs graph_sizes tree_plan tree_blocks prefixes micro_batches agent agent_files
        kernels_ahead batch credit gradients in_place loading optimizer parked step_meter weights memory
        model_shape activations copies host_copy host_states out_of_memory quantized update_inputs
        whole_sums""",
    "agents together": """hosts hosts.* residency team rollout context score groups ability difficulty ranking
        ranking_* checkpoint failures metrics trackers steplog progress runfolder plan fill_in engine_checks
        plan_command plan_table""",
    "runs": """session heldout interaction alone evaluate evaluate_* benchmarks benchmarks.* train ablate ablate_*
        calibration_effect difficulty_study warm_start merge finish show report report.* docs_config
        gradable ilr_benchmarks.*""",
    "commands": "cli",
}
PURE = """types errors own quoting statistics interrupt durable config config_* data benchmark_sets choices tasks
    tasks.* rewards rewards.* protocols protocols.* chat hosts residency rollout context score groups ability
    difficulty ranking ranking_* checkpoint failures metrics trackers steplog progress runfolder environment
    dialogue_rows transcripts report report.* show docs_config cli ilr_benchmarks.bench"""


def short(module: str) -> str:
    return module.removeprefix("ilr_fast.")


def matches(module: str, patterns: str) -> bool:
    return any(fnmatchcase(short(module), pattern) for pattern in patterns.split())


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the project, by name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(module: str, *, lazy: bool) -> set[str]:
    """What a module imports, as modules of the project where they are; without `lazy` only what loading it does."""
    found = set()
    for node in _statements(sources()[module], lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & set(sources())
            found |= submodules
            if len(submodules) < len(names):
                found.add(str(node.module))
    return found


def _statements(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not lazy and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield node
        yield from _statements(node, lazy)


def layer(module: str) -> int:
    found = [i for i, patterns in enumerate(LAYERS.values()) if matches(module, patterns)]
    assert len(found) == 1, f"{module} has {len(found)} layers: put it into LAYERS of {Path(__file__).name}"
    return found[0]


@pytest.mark.parametrize("module", sorted(sources()))
def test_no_module_imports_a_higher_layer(module):
    names = list(LAYERS)
    for other in imports(module, lazy=True) & set(sources()):
        assert layer(other) <= layer(module), (
            f"{module} ({names[layer(module)]}) imports {other} ({names[layer(other)]})"
        )


def test_no_circles():
    TopologicalSorter({module: imports(module, lazy=False) & set(sources()) for module in sources()}).prepare()


def loaded(module: str) -> set[str]:
    """Everything that loading a module loads: its imports, theirs, and the packages above each."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in sources():
            parents = {name[:i] for i, letter in enumerate(name) if letter == "."}
            waiting += [*imports(name, lazy=False), *parents]
    return seen


@pytest.mark.parametrize("module", sorted(m for m in sources() if matches(m, PURE)))
def test_pure_modules_load_no_framework(module):
    heavy = {name.split(".")[0] for name in loaded(module)} & HEAVY
    assert not heavy, f"loading {module} loads {', '.join(heavy)}"


def test_kernels_know_nothing_of_the_rest():
    for module in sources():
        if module.startswith("ilr_kernels"):
            assert not any(name.startswith("ilr_fast") for name in imports(module, lazy=True)), module


def test_vllm_stays_in_the_engines():
    users = [m for m in sources() if any(name.split(".")[0] == "vllm" for name in imports(m, lazy=True))]
    beside = ("ilr_benchmarks.rollout_", "ilr_benchmarks.curve_trl")  # vLLM by itself, and what it does in a step
    assert all(matches(user, "engines.*") or user.startswith(beside) for user in users), users
