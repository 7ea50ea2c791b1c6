"""Which curves a report draws from metrics.jsonl, for one run or several on the same axes.

An agent of a run keeps one colour throughout. Charts without a single number are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from ilr_fast.report.charts import Chart, Series, curves, stacked
from ilr_fast.report.runs import Run, dig
from ilr_fast.report.scales import Unit

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


def colours(runs: Sequence[Run]) -> dict[tuple[str, str], int]:
    """The palette's number for each (run, agent)."""
    return {key: i for i, key in enumerate((run.name, agent) for run in runs for agent in run.agents)}


def learning_charts(runs: Sequence[Run]) -> list[Markup]:
    """Accuracy: on validation questions, and in the dialogues by stage (one scale for all of them)."""
    stages = list(dict.fromkeys(stage for run in runs for stage in run.stages))
    charts = [_chart(runs, "Validation accuracy", ("validation_accuracy",), "percent", "alone", sparse=True)]
    charts += [_chart(runs, f"Accuracy: {s}", ("accuracy", s), "percent", "in dialogues, sampled") for s in stages]
    high = min(1.0, max((v for chart in charts for v in chart.values), default=1.0) * 1.08)
    return _drawn([Chart(c.title, c.unit, c.series, c.note, low=0.0, high=max(high, 0.1)) for c in charts])


def training_charts(runs: Sequence[Run]) -> list[Markup]:
    """Rewards, interaction, loss statistics, speed and memory."""
    charts = [_chart(runs, *row) for row in AGENT_CHARTS]
    return _drawn([*charts[:6], _logp_difference(runs), *charts[6:]])


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


def _chart(
    runs: Sequence[Run], title: str, keys: tuple[str, ...], unit: Unit, note: str, *, sparse: bool = False
) -> Chart:
    palette = colours(runs)
    series = []
    for run in runs:
        for agent in run.agents:
            points = run.column(agent, *keys)
            if keys == ("groups_dropped",):
                points = [(x, y / n if y is not None and n else None)
                          for (x, y), (_, n) in zip(points, run.column(agent, "groups"), strict=True)]
            label = series_label(runs, run, agent)
            series.append(Series(label, palette[run.name, agent], points, sparse=sparse))
    return Chart(title, unit, series, note)


def _logp_difference(runs: Sequence[Run]) -> Chart:
    """Mean (solid) and largest (dashed) difference between the trainer's log-probs and the engine's."""
    mean = _chart(runs, "", ("logp_diff_mean",), "plain", "").series
    largest = _chart(runs, "", ("logp_diff_max",), "plain", "").series
    series = [Series(f"{s.label}, mean", s.colour, s.points) for s in mean]
    series += [Series(f"{s.label}, max", s.colour, s.points, dash=1) for s in largest]
    return Chart("Trainer's log-probs against the engine's", "plain", series, "", log=True)


def _drawn(charts: Sequence[Chart]) -> list[Markup]:
    return [svg for svg in map(curves, charts) if svg]
