"""One step's numbers → its row of metrics.jsonl. A number that does not exist is None, never 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ilr_fast.config import LogConfig
from ilr_fast.types import Credited, StepResult

AGENT_KEYS = ("loss", "entropy", "kl_reference", "logp_diff_mean", "logp_diff_max", "engine_noise", "clip_share",
              "truncated_share", "grad_norm", "lr")


def metrics_row(
    step: int,
    credited: Sequence[Credited],
    results: Mapping[str, StepResult],
    stats_before: Mapping[str, Mapping[str, float]],
    stats_after: Mapping[str, Mapping[str, float]],
    failures: Sequence[Mapping],
) -> dict:
    """The row without `seconds` and validation; `stats_*` are the hosts' counters around the rollout."""
    agents = {
        name: _agent(name, credited, result, stats_before[name], stats_after[name]) for name, result in results.items()
    }
    grown = {key: sum(stats_after[n][key] - stats_before[n][key] for n in results)
             for key in ("tokens_prompt", "tokens_generated", "tokens_reused")}
    tokens = {
        "prompt": int(grown["tokens_prompt"]),
        "prompt_reused": int(grown["tokens_reused"]),
        "generated": int(grown["tokens_generated"]),
        "trained": sum(r.tokens_trained for r in results.values()),
        "dropped": sum(r.tokens_dropped for r in results.values()),
    }
    return {"step": step, "tokens": tokens, "failures": len(failures), "agents": agents}


def diverging(row: Mapping, log: LogConfig, exact: Sequence[str] = ()) -> dict[str, str]:
    """The agents whose trainer does not see the distribution that its engine sampled from, and what says so: the first
    number of the row that is over its limit in the config. Of the agents in `exact` no token may differ at all."""
    found = {}
    for name, agent in row["agents"].items():
        if name in exact and (most := agent.get("logp_diff_max")):
            found[name] = f"a token's log-probs differ by {most:.3g} in step {row['step']}, and its engine is exact"
        for key, limit, words in (
            ("logp_diff_mean", "logp_warning", "log-probs of trainer and engine differ by {:.3g} on average"),
            ("logp_diff_max", "logp_warning_max", "a token's log-probs of trainer and engine differ by {:.3g}"),
            ("truncated_share", "truncated_warning", "a share of {:.3g} of the importance weights is over the cap"),
        ):
            value, most = agent.get(key), getattr(log, limit)
            if name not in found and value is not None and most is not None and value > most:
                found[name] = f"{words.format(value)} in step {row['step']}, more than log.{limit} = {most:g}"
    return found


def _agent(
    name: str, credited: Sequence[Credited], result: StepResult, before: Mapping[str, float], after: Mapping[str, float]
) -> dict:
    groups = _groups(name, credited)
    seconds = after["seconds_busy"] - before["seconds_busy"]
    generated = after["tokens_generated"] - before["tokens_generated"]
    prompt = after["tokens_prompt"] - before["tokens_prompt"]
    turns = [turn for c in credited for turn in c.scored.dialogue.turns[name]]
    return {
        "accuracy": _accuracy(name, credited),
        "reward": mean(r for c in credited for r in c.scored.rewards[name] if r is not None),
        "calibrated_reward": mean(r for c in credited for r in c.calibrated[name] if r is not None),
        "groups": len(groups),
        "groups_dropped": sum(not any(advantages) for advantages in groups.values()),
        "cooperation_share": mean(float(t.interaction == "cooperation") for t in turns if t.interaction != "neutral"),
        "stopped_share": mean(float(t.generation.finish == "stop") for t in turns),
        **{key: result.metrics.get(key) for key in AGENT_KEYS},
        "skipped": result.skipped,
        "memory_peak_gib": after.get("memory_peak_gib"),
        "tokens_generated": int(generated),
        "tokens_per_second": generated / seconds if seconds > 0 else None,
        "prefix_hit_rate": (after["tokens_reused"] - before["tokens_reused"]) / prompt if prompt else None,
        "validation_accuracy": None,
    }


def _groups(name: str, credited: Sequence[Credited]) -> dict[tuple[str, str], list[float]]:
    """Advantages by (question, stage)."""
    groups: dict[tuple[str, str], list[float]] = {}
    for item in credited:
        for turn, advantage in zip(item.scored.dialogue.turns[name], item.advantages[name], strict=True):
            if advantage is not None:
                groups.setdefault((item.scored.dialogue.question.id, turn.stage), []).append(advantage)
    return groups


def _accuracy(name: str, credited: Sequence[Credited]) -> dict[str, float | None]:
    """Share of right answers by stage, over the turns that could be graded."""
    by_stage: dict[str, list[float]] = {}
    for item in credited:
        for turn, grade in zip(item.scored.dialogue.turns[name], item.scored.grades[name], strict=True):
            if grade.reward is not None:
                by_stage.setdefault(turn.stage, []).append(float(grade.correct))
    return {stage: mean(values) for stage, values in by_stage.items()}


def mean(values: Iterable[float]) -> float | None:
    """The mean, None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None
