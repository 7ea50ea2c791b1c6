"""Which curves a report draws from metrics.jsonl, for one run, several seeds or several arms.

One arm: all its agents in one figure. Several arms: a figure for each agent, the arms beside each other. Figures
without a number are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ilr_fast.report.arms import Arm, titles
from ilr_fast.report.runs import Run, dig
from ilr_fast.report.series import Point, Series
from ilr_fast.report.texts import Unit
from ilr_fast.report.vega import Axis, Figure, curves, stacked

PHASES = ("generate", "reward", "train", "sync", "swap", "checkpoint", "evaluate", "other")
Row = tuple[str, tuple[str, ...], Unit, str, str]
# title, keys below the agent, unit, axis, note
TRAINING: tuple[Row, ...] = (
    ("Reward", ("reward",), "plain", "reward", "mean over turns"),
    ("Calibrated reward", ("calibrated_reward",), "plain", "calibrated reward", "with the peers' term"),
    ("Share of cooperation", ("cooperation_share",), "percent", "cooperation", "the rest competes"),
    ("Entropy", ("entropy",), "plain", "entropy, nats per token", ""),
    ("KL to the reference", ("kl_reference",), "plain", "KL, nats per token", ""),
    ("Gradient norm", ("grad_norm",), "plain", "gradient norm", "before clipping"),
    ("Share of clipped tokens", ("clip_share",), "percent", "clipped tokens", ""),
    ("Groups without a gradient", ("groups_dropped",), "percent", "dropped groups", "dropped / all groups"),
)
MACHINE: tuple[Row, ...] = (
    ("Peak memory", ("memory_peak_gib",), "gib", "peak memory, GiB", "so far"),
    ("Tokens per second", ("tokens_per_second",), "count", "tokens per second", "generated"),
    ("Prompts from the prefix cache", ("prefix_hit_rate",), "percent", "tokens not computed", "of all prompts' tokens"),
    ("Importance weights above the cap", ("truncated_share",), "percent", "tokens", "trained tokens"),
)


def labels_of(arms: Sequence[Arm]) -> list[str]:
    """All names of curves, in the order of their colours."""
    return arms[0].agents if len(arms) == 1 else list(dict.fromkeys(arm.label for arm in arms))


def learning_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Accuracy: on validation questions, and in the dialogues by stage (one scale for all of them)."""
    stages = list(dict.fromkeys(stage for arm in arms for stage in arm.stages))
    rows: list[tuple[Row, bool]] = [
        (("Validation accuracy", ("validation_accuracy",), "percent", "right answers", "alone, held-out"), True),
        *((("Accuracy: " + stage, ("accuracy", stage), "percent", "right answers", "in dialogues, sampled"), False)
          for stage in stages),
    ]  # fmt: skip
    values = [y for row, _ in rows for arm in arms for agent in arm.agents
              for column in _columns(arm, agent, row[1]) for _, y in column if y is not None]  # fmt: skip
    high = max(0.1, min(1.0, max(values, default=1.0) * 1.05))
    return [figure for row, sparse in rows for figure in _figures(arms, row, sparse=sparse, high=high)]


def training_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Rewards, interaction, loss statistics."""
    return [figure for row in TRAINING for figure in _figures(arms, row)]


def machine_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Trainer against engine, memory, speed, and the seconds of each step by phase for each arm."""
    figures = _mismatch(arms) + [figure for row in MACHINE for figure in _figures(arms, row)]
    for arm, title in zip(arms, titles(arms), strict=True):
        suffix = f" · {title}" if title else ""
        series = [Series(phase, [_phase(run, phase) for run in arm.runs]) for phase in PHASES]
        drawn = stacked("Seconds of a step" + suffix, "by phase", Axis("seconds", "seconds"), series)
        figures += [drawn] if drawn else []
    return figures


def _figures(arms: Sequence[Arm], row: Row, *, sparse: bool = False, high: float | None = None) -> list[Figure]:
    """One figure of all agents, or one for each agent where there are several arms."""
    title, keys, unit, axis, note = row
    found = [
        curves(title + suffix, note, Axis(axis, unit, high), [replace(s, sparse=sparse) for s in series],
               labels_of(arms))
        for suffix, series in _by_figure(arms, keys)
    ]  # fmt: skip
    return [figure for figure in found if figure]


def _by_figure(arms: Sequence[Arm], keys: tuple[str, ...]) -> list[tuple[str, list[Series]]]:
    if len(arms) == 1:
        return [("", [Series(agent, _columns(arms[0], agent, keys)) for agent in arms[0].agents])]
    agents = list(dict.fromkeys(agent for arm in arms for agent in arm.agents))
    return [(f" · {agent}", [Series(arm.label, _columns(arm, agent, keys)) for arm in arms if agent in arm.agents])
            for agent in agents]  # fmt: skip


def _columns(arm: Arm, agent: str, keys: tuple[str, ...]) -> list[list[Point]]:
    columns = []
    for run in arm.runs:
        column = run.column(agent, *keys)
        if keys == ("groups_dropped",):
            column = [(x, y / n if y is not None and n else None)
                      for (x, y), (_, n) in zip(column, run.column(agent, "groups"), strict=True)]  # fmt: skip
        columns.append(column)
    return columns


def _mismatch(arms: Sequence[Arm]) -> list[Figure]:
    """Mean (solid) and largest (dashed) difference between the trainer's log-probs and the engine's."""
    means, largest = (_by_figure(arms, (key,)) for key in ("logp_diff_mean", "logp_diff_max"))
    figures = []
    for (suffix, mean), (_, most) in zip(means, largest, strict=True):
        series = [*mean, *(replace(s, dashed=True) for s in most)]
        figures.append(curves(f"Log-probs, trainer against engine{suffix}", "mean; dashed: the largest",
                              Axis("difference, nats", "plain", log=True), series, labels_of(arms)))  # fmt: skip
    return [figure for figure in figures if figure]


def _phase(run: Run, phase: str) -> list[Point]:
    return [(row["step"], dig(row, "seconds", phase)) for row in run.metrics]
