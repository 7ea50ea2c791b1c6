"""Which curves a report draws from metrics.jsonl, for one run or several on the same axes.

An agent of a run (a run, where there are many) keeps one colour throughout. Charts without a number are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from markupsafe import Markup

from ilr_fast.report.charts import Chart, Series, curves, stacked
from ilr_fast.report.runs import Run, dig
from ilr_fast.report.scales import Unit

CURVES = 4  # at most so many in one chart, before each agent gets its own
PHASES = ("generate", "reward", "train", "sync", "swap", "checkpoint", "evaluate", "other")
# title, keys below the agent, unit, note
AGENT_CHARTS: tuple[tuple[str, tuple[str, ...], Unit, str], ...] = (
    ("Reward", ("reward",), "plain", "mean over turns"),
    ("Calibrated reward", ("calibrated_reward",), "plain", "with the peers' term"),
    ("Share of cooperation", ("cooperation_share",), "percent", "the rest competes"),
    ("Groups without a gradient", ("groups_dropped",), "percent", "dropped / all groups"),
    ("Entropy", ("entropy",), "plain", "nats per token"),
    ("KL to the reference", ("kl_reference",), "plain", "nats per token"),
    ("Gradient norm", ("grad_norm",), "plain", "before clipping"),
    ("Share of clipped tokens", ("clip_share",), "percent", ""),
    ("Tokens per second", ("tokens_per_second",), "count", "generated"),
    ("Peak memory", ("memory_peak_gib",), "gib", "GiB"),
)


def is_crowded(runs: Sequence[Run]) -> bool:
    """Whether all agents of all runs are too many curves for one chart; each agent then has charts of its own."""
    return len(runs) > 1 and sum(len(run.agents) for run in runs) > CURVES


def colours(runs: Sequence[Run]) -> dict[tuple[str, str], int]:
    """The palette's number for each (run, agent); where charts are parted by agent, a run's."""
    if is_crowded(runs):
        return {(run.name, agent): i for i, run in enumerate(runs) for agent in run.agents}
    return {key: i for i, key in enumerate((run.name, agent) for run in runs for agent in run.agents)}


def learning_charts(runs: Sequence[Run]) -> list[Markup]:
    """Accuracy: on validation questions, and in the dialogues by stage (one scale for all of them)."""
    stages = list(dict.fromkeys(stage for run in runs for stage in run.stages))
    charts = _charts(runs, "Validation accuracy", ("validation_accuracy",), "percent", "alone", sparse=True)
    for stage in stages:
        charts += _charts(runs, f"Accuracy: {stage}", ("accuracy", stage), "percent", "in dialogues, sampled")
    high = min(1.0, max((v for chart in charts for v in chart.values), default=1.0) * 1.08)
    return _drawn([replace(chart, low=0.0, high=max(high, 0.1)) for chart in charts])


def training_charts(runs: Sequence[Run]) -> list[Markup]:
    """Rewards, interaction, loss statistics, speed and memory."""
    charts = [chart for row in AGENT_CHARTS[:6] for chart in _charts(runs, *row)]
    charts += _logp_differences(runs)
    return _drawn(charts + [chart for row in AGENT_CHARTS[6:] for chart in _charts(runs, *row)])


def time_charts(runs: Sequence[Run]) -> list[Markup]:
    """Seconds of each step by phase, a chart for each run."""
    drawn = []
    for run in runs:
        series = [Series(phase, i, [(row["step"], dig(row, "seconds", phase)) for row in run.metrics])
                  for i, phase in enumerate(PHASES)]
        series = [s for s in series if any(y for _, y in s.points)]
        title = "Seconds of a step" + (f": {run.name}" if len(runs) > 1 else "")
        drawn.append(stacked(Chart(title, "seconds", series, "by phase")))
    return [chart for chart in drawn if chart]


def series_label(runs: Sequence[Run], run: Run, agent: str) -> str:
    """The agent; with several runs, the run too."""
    return f"{run.name} · {agent}" if len(runs) > 1 else agent


def _charts(
    runs: Sequence[Run], title: str, keys: tuple[str, ...], unit: Unit, note: str, *, sparse: bool = False
) -> list[Chart]:
    """One chart of all agents of all runs, or one for each agent where they are many."""
    if not is_crowded(runs):
        series = [_series(runs, run, agent, keys, sparse) for run in runs for agent in run.agents]
        return [Chart(title, unit, series, note)]
    agents = list(dict.fromkeys(agent for run in runs for agent in run.agents))
    return [
        Chart(f"{title} · {agent}", unit,
              [_series(runs, run, agent, keys, sparse) for run in runs if agent in run.agents], note)
        for agent in agents
    ]  # fmt: skip


def _series(runs: Sequence[Run], run: Run, agent: str, keys: tuple[str, ...], sparse: bool = False) -> Series:
    points = run.column(agent, *keys)
    if keys == ("groups_dropped",):
        points = [(x, y / n if y is not None and n else None)
                  for (x, y), (_, n) in zip(points, run.column(agent, "groups"), strict=True)]
    label = run.name if is_crowded(runs) else series_label(runs, run, agent)
    return Series(label, colours(runs)[run.name, agent], points, sparse=sparse)


def _logp_differences(runs: Sequence[Run]) -> list[Chart]:
    """Mean (solid) and largest (dashed) difference between the trainer's log-probs and the engine's."""
    means = _charts(runs, "Log-probs, trainer against engine", ("logp_diff_mean",), "plain", "")
    largest = _charts(runs, "", ("logp_diff_max",), "plain", "")
    return [
        replace(mean, log=True, series=[replace(s, label=f"{s.label}, mean") for s in mean.series]
                + [replace(s, label=f"{s.label}, max", dash=1) for s in high.series])
        for mean, high in zip(means, largest, strict=True)
    ]  # fmt: skip


def _drawn(charts: Sequence[Chart]) -> list[Markup]:
    return [svg for svg in map(curves, charts) if svg]
