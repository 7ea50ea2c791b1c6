"""What calibration changes, on the dialogues of a run: the same turns under every form of credit (docs/calibration.md).

    python -m ilr_fast.calibration_effect runs/largest-ablation/ilr_pc-seed1          # a table, or --json

Each turn is given a reward of two values (right or wrong) or a graded one (with `format_weight` for the form), and
advantages are formed without calibration and with it, by std (`grpo`) and without (`dr_grpo`). Nothing is sampled or
trained: the differences are those of the formulas alone. Columns: the largest and mean |difference| of an advantage,
the correlation and slope of calibrated over plain advantages, the share of groups that change by more than 1% of
their largest advantage beyond one common factor, and the share of groups without a spread that get an advantage all
the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ilr_fast.config import Config, CreditConfig
from ilr_fast.config_parse import load_config
from ilr_fast.credit import credit
from ilr_fast.protocols import DialogueProtocol, load_protocol
from ilr_fast.runfolder import read_dialogues
from ilr_fast.transcripts import read_steps
from ilr_fast.types import Credited, Scored

FORMS = (("binary", 0.0), ("graded", 0.1))
Key = tuple[str, str, str]  # agent, question, stage


def effects(steps: Sequence[Sequence[Scored]], config: Config) -> list[dict[str, Any]]:
    """One row for each form of reward, normalization and kind of calibration, over the dialogues of some steps."""
    protocol = load_protocol(config.protocol, config)
    weight = config.reward.format_weight or FORMS[1][1]
    rows = []
    for form, own in FORMS:
        rewarded = [[_rewarded(one, own and weight, protocol, config) for one in step] for step in steps]
        for advantage in ("grpo", "dr_grpo"):
            plain = _advantages(rewarded, replace(config.credit, calibrate="none", advantage=advantage))
            for calibrate in ("reward", "advantage"):
                changed = _advantages(rewarded, replace(config.credit, calibrate=calibrate, advantage=advantage))
                about = {"reward": form, "advantage": advantage, "calibrate": calibrate}
                rows.append({**about, **_compare(plain, changed)})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    heads = ("reward", "normalization", "calibrate", "largest change", "mean change", "correlation", "slope",
             "groups reshaped", "flat groups moved")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * 3 + ['---:'] * 6)} |"]
    for row in rows:
        numbers = [f"{row['largest']:.2g}", f"{row['mean']:.2g}", _number(row["correlation"]), _number(row["slope"]),
                   f"{row['reshaped']:.0%}", f"{row['flat_moved']:.0%}"]  # fmt: skip
        lines.append(f"| {' | '.join([row['reward'], row['advantage'], row['calibrate'], *numbers])} |")
    return "\n".join(lines) + "\n"


def _rewarded(scored: Scored, weight: float, protocol: DialogueProtocol, config: Config) -> Scored:
    """The dialogue with rewards of another form, from its grades."""
    rewards = {}
    for name, turns in scored.dialogue.turns.items():
        grades = dict(zip((turn.stage for turn in turns), scored.grades[name], strict=True))
        sources = [grades[protocol.reward_stage(turn.stage, config.reward.stage_reward)] for turn in turns]
        rewards[name] = tuple(None if g.reward is None else float(g.correct) + weight * g.formatted for g in sources)
    return replace(scored, rewards=rewards)


def _advantages(steps: Sequence[Sequence[Scored]], config: CreditConfig) -> list[list[float]]:
    """Advantages by group, in an order that is the same for every form of credit."""
    groups: dict[tuple[int, Key], list[float]] = {}
    for number, step in enumerate(steps):
        for one in credit(step, list(step[0].dialogue.turns), config):
            for key, value in _turns(one):
                groups.setdefault((number, key), []).append(value)
    return [groups[key] for key in sorted(groups)]


def _turns(one: Credited) -> Iterator[tuple[Key, float]]:
    dialogue = one.scored.dialogue
    for name, turns in dialogue.turns.items():
        for turn, value in zip(turns, one.advantages[name], strict=True):
            if value is not None:
                yield (name, dialogue.question.id, turn.stage), value


def _compare(plain: Sequence[Sequence[float]], changed: Sequence[Sequence[float]]) -> dict[str, Any]:
    a, b = np.concatenate([np.array(g) for g in plain]), np.concatenate([np.array(g) for g in changed])
    spread = [np.ptp(g) > 1e-9 for g in plain]
    reshaped = [_reshaped(np.array(g), np.array(h)) for g, h, s in zip(plain, changed, spread, strict=True) if s]
    moved = [np.abs(h).max() > 1e-9 for h, s in zip(changed, spread, strict=True) if not s]
    varied = a.std() > 0 and b.std() > 0
    return {
        "turns": len(a),
        "groups": len(plain),
        "largest": float(np.abs(b - a).max()),
        "mean": float(np.abs(b - a).mean()),
        "correlation": float(np.corrcoef(a, b)[0, 1]) if varied else None,
        "slope": float((a * b).sum() / (a * a).sum()) if varied else None,
        "reshaped": float(np.mean(reshaped)) if reshaped else 0.0,
        "flat_moved": float(np.mean(moved)) if moved else 0.0,
    }


def _reshaped(plain: np.ndarray, changed: np.ndarray) -> bool:
    """Whether a group's calibrated advantages are no multiple of its plain ones, to within 1% of the largest."""
    factor = (plain * changed).sum() / (plain * plain).sum()
    return bool(np.abs(changed - factor * plain).max() > 0.01 * np.abs(changed).max())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the effects on one run's dialogues."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    steps = [[c.scored for c in read_dialogues(options.run, step)] for step in read_steps(options.run)]
    rows = effects([step for step in steps if step], load_config(options.run / "config.yaml"))
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
