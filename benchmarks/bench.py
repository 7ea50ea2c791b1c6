"""`ilr-fast bench [NAME …]`: runs benchmarks, prints a table of each, writes their JSON and draws figures.

    ilr-fast bench lm_head advantage
    ilr-fast bench figures                # draws again from benchmarks/results; needs no GPU

Without names, all that fit the machine. Errors are found first; a variant whose error is too large gets no time, and
the exit status is then 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ilr_fast.errors import RunError, UserError, nearest

GPU = ("lm_head", "lm_head_shapes", "lm_head_sweep", "advantage", "adamw", "rollout", "rollout_agents", "rollout_small",
       "sleep", "train_step", "step", "step_agents", "exactness", "memory", "memory_layers")
CPU = ("lm_head_cpu",)
# Only where named: they need data sets, models, other libraries.
NAMED = ("graders", "curve", "comlrl", "comlrl_cpu", "trl_step", "step_checkpoint", "step_ahead",
         "rollout_host", "rollout_defaults", "rollout_start")
ON_CPU = (*CPU, "graders", "comlrl_cpu", "rollout_host")
FIGURES, DRAWN = "figures", ("lm_head_sweep", "curve")


def bench(
    names: Sequence[str],
    *,
    rounds: int,
    out: Path | None,
    quick: bool,
    only_ours: bool,
    command: str,
    commit: str | None = None,
    draw: bool = True,
) -> list[Path]:
    """Runs the named benchmarks; returns the JSON files. Raises RunError after all where a variant was wrong."""
    known = (*GPU, *CPU, *NAMED, FIGURES)
    for name in names:
        if name not in known:
            raise UserError(f"unknown benchmark {name!r}", "bench", nearest(name, known))
    if rounds < 1:
        raise UserError(f"{rounds} rounds", "--rounds", "give at least 1")
    from ilr_benchmarks import common, curve_figure, figures

    common.given_commit(commit)
    device = _device(names, quick)
    chosen = [name for name in names if name != FIGURES] if names else (GPU if device == "cuda" else CPU)
    drawn = set(DRAWN) if FIGURES in names else set(DRAWN).intersection(chosen) if draw else set()
    if drawn:
        figures.require_matplotlib()
    paths, wrong = [], []
    for name in chosen:
        run: Callable[..., Iterable[dict[str, Any]]] = import_module(f"ilr_benchmarks.{name}").run
        where = "cpu" if name in ON_CPU else device
        found = run(rounds=rounds, quick=quick, only_ours=only_ours, device=where)
        rows: list[dict[str, Any]] = []
        for row in found:  # of a long benchmark, what there is is kept as it comes
            rows.append(row)
            if isinstance(found, Iterator):
                common.write_results(name + ("_quick" if quick else ""), rows, command, out, commit)
        print(f"\n{name}\n{table(rows)}")
        paths.append(common.write_results(name + ("_quick" if quick else ""), rows, command, out, commit))
        print(f"written: {paths[-1]}")
        wrong += [f"{name}: {row['variant']}" for row in rows if row.get("status", "").startswith("wrong")]
    for name, files in (("lm_head_sweep", figures.draw_results), ("curve", curve_figure.draw_curves)):
        for path in files(out, quick) if name in drawn else ():
            print(f"drawn: {path}")
    if wrong:
        raise RunError(f"wrong and therefore not timed: {'; '.join(wrong)}")
    return paths


def _device(names: Sequence[str], quick: bool) -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    needs = [name for name in names if name in (*GPU, "curve")]
    if needs and not quick:
        raise UserError(f"{needs[0]} needs an NVIDIA GPU", "bench", "--quick runs its variants on the CPU, small")
    return "cpu"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Variant, ms, × limit, extra GiB, error and targets, by shape."""
    lines: list[str] = []
    shape = None
    for row in rows:
        if row["shape"] != shape:
            shape = row["shape"]
            lines += [shape, f"  {'variant':46}{'ms':>10}{'× limit':>9}{'GiB':>7}{'error':>10}  target"]
        met = {True: "met", False: "NOT met", None: ""}[row.get("met")]
        ms = "—" if row["ms"] is None else f"{row['ms']:.4g}"
        told = row.get("status", "timed")
        target = f"{row.get('target') or ''} {met}" if told == "timed" else told
        numbers = f"{ms:>10}{_number(row['over_limit'], '.3f'):>9}{_number(row['extra_gib'], '.2f'):>7}"
        lines.append(f"  {row['variant']:46}{numbers}{_number(row['error'], '.1e'):>10}  {target}".rstrip())
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
