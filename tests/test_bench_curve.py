"""`ilr-fast bench curve`: what both sides are given, how their files become curves, and what is compared."""

import json
import math

import pytest

curve = pytest.importorskip("ilr_benchmarks.curve")
from ilr_benchmarks import curve_figure, curve_rule, curve_summary  # noqa: E402

from ilr_fast.config_parse import load_config  # noqa: E402
from ilr_fast.data import load_splits  # noqa: E402


def points(*accuracies, seconds=1.0):
    return [[5 * i, 1280 * i, seconds * i, accuracy] for i, accuracy in enumerate(accuracies)]


def result(side, *accuracies, seconds=1.0, seed=1, beside=False):
    found = points(*accuracies, seconds=seconds)
    return {"variant": side, "curve": found, "seed": seed, "beside_others": beside}


def unordered(part):
    return {tuple(sorted(pair)) for pair in part}


def test_no_pair_is_trained_on_and_held_out_in_any_order():
    train, held, test = curve.pairs(1)
    assert [len(unordered(part)) for part in (train, held, test)] == [1275 - 304, 300, 4]
    assert len(unordered([*train, *held, *test])) == 1275
    for part in (train, held, test):
        assert {(b, a) for a, b in part} == set(part) and len(set(part)) == len(part)
    assert curve.pairs(1) == (train, held, test) != curve.pairs(2)


def test_our_command_is_a_config_that_reads_the_problems(tmp_path):
    curve.write_problems(tmp_path, 1)
    *_, path, run, seed, steps = (command := curve.ours(tmp_path, 2, 60, 5, False))[:8]
    assert (seed, steps) == ("seed=2", "steps=60") and run.startswith("run=")
    config = load_config(path, command[5:])
    assert (config.rollout.questions, config.rollout.samples) == (curve.QUESTIONS, curve.SAMPLES)
    assert config.agents["smollm2"].optimizer.lr == curve.RATE and config.checkpoint.every is None
    splits = load_splits(config.data, config.seed)
    train, held, test = curve.pairs(1)
    assert [len(splits[part]) for part in ("train", "validation", "test")] == [len(train), len(held), len(test)]
    assert config.evaluate.validation_limit >= len(held) > 580


def test_seconds_are_those_of_training(tmp_path):
    def row(step, accuracy, evaluate):
        seconds = {"total": 3.0, "evaluate": evaluate, "checkpoint": None}
        return {"step": step, "seconds": seconds, "agents": {"smollm2": {"validation_accuracy": accuracy}}}

    rows = [row(1, None, None), row(2, 0.5, 1.0), row(3, 0.75, 2.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert curve.our_curve(tmp_path) == ([[2, 512, 5.0, 0.5], [3, 768, 6.0, 0.75]], [3.0, 2.0, 1.0])
    lines = [{"step": 0, "seconds": 0.0, "accuracy": 0.25}, {"step": 1, "step_seconds": 2.0}]
    (tmp_path / "trl.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curve.their_curve(tmp_path / "trl.jsonl") == ([[0, 0, 0.0, 0.25]], [2.0])
    assert curve.their_curve(tmp_path / "none.jsonl") == ([], [])


def test_a_goal_is_reached_by_the_mean_of_three_evaluations():
    told = curve_rule.reached(points(0.2, 0.72, 0.58, 0.5, 0.75, 0.72, 0.63))
    assert told["steps_to_50%"] == 10 and told["steps_to_60%"] == 15 and told["steps_to_70%"] == 30
    assert curve_rule.reached(points(0.2, 0.9))["seconds_to_70%"] is None  # an evaluation alone does not count
    assert curve_rule.reached([])["steps_to_50%"] is None


def compare(*found):
    (row,) = curve_rule.compared(found)
    return row


def test_seeds_are_compared_by_their_geometric_mean_with_its_interval():
    ours = [result(curve.OURS, 0.2, 0.95, 0.95, seed=seed) for seed in (1, 2, 3)]
    theirs = [result(curve.THEIRS, 0.2, 0.95, 0.95, seconds=s, seed=seed) for seed, s in ((1, 1.0), (2, 4.0), (3, 2.0))]
    row = compare(*ours, *theirs)
    assert row["seconds_to_goal"] == [(2.0, 2.0), (2.0, 8.0), (2.0, 4.0)] and row["seeds"] == [1, 2, 3]
    assert row["times_faster"] == pytest.approx(2.0) and row["met"]
    low, high = row["times_faster_ci95"]
    half = 4.303 * math.log(2) / 3**0.5
    assert (low, high) == (pytest.approx(2 * math.exp(-half), rel=1e-3), pytest.approx(2 * math.exp(half), rel=1e-3))
    assert row["step_times_faster"] == pytest.approx(2.0)
    assert row["mean_curve_seconds_to_goal"] == [2.0, pytest.approx(14 / 3)]
    assert row["mean_curve_times_faster"] == pytest.approx(7 / 3)
    assert row["accuracy_difference"] == 0 and row["accuracy_difference_ci95"] == (0, 0)
    assert row["accuracy_by_step"][1] == [5, pytest.approx(0.95), pytest.approx(0.95)]
    assert compare(*ours, *[{**r, "seed": 9} for r in theirs[1:2]], theirs[0])["met"] is False  # seed 1 alone: 1 time


def test_a_side_that_never_comes_to_the_goal_counts_with_all_its_seconds():
    quick, slow = result(curve.OURS, 0.2, 0.95, 0.95), result(curve.THEIRS, 0.2, 0.6, 0.6, seconds=2.0)
    row = compare(quick, slow)
    assert row["seconds_to_goal"] == [(2.0, None)] and row["times_faster"] == pytest.approx(2.0) and row["met"]
    assert row["times_faster_ci95"] is None and row["mean_curve_times_faster"] is None
    never = compare(result(curve.OURS, 0.2, 0.6, 0.6), result(curve.THEIRS, 0.2, 0.95, 0.95, seconds=9.0))
    assert never["times_faster"] == pytest.approx(9.0) and never["met"] is False


def test_what_ran_beside_others_has_no_times_and_what_one_side_ran_is_not_compared():
    ours, theirs = (result(side, 0.2, 0.95, 0.95, beside=True) for side in (curve.OURS, curve.THEIRS))
    row = compare(ours, theirs)
    assert row["seconds_to_goal"] == [] and row["times_faster"] is row["met"] is None
    assert row["accuracy_difference"] == 0 and row["accuracy_difference_ci95"] is None
    assert list(curve_rule.compared([ours, result(curve.THEIRS, 0.2)])) == []  # it ended in its first step
    assert list(curve_rule.compared([ours])) == list(curve_rule.compared([ours, {**theirs, "curve": []}])) == []


def test_the_figure_holds_every_seed(tmp_path):
    pytest.importorskip("matplotlib")
    assert curve_figure.draw_curves(tmp_path, False) == []
    rows = [result(side, 0.4, 0.8, 0.9, seed=seed) for side in (curve.OURS, curve.THEIRS) for seed in (1, 2)]
    about = {"device": "H100", "versions": {"torch": "2.11"}, "commit": None, "date": "2026-11-26T02:00"}
    (tmp_path / "curve.json").write_text(json.dumps({**about, "rows": rows}))
    (file,) = curve_figure.draw_curves(tmp_path, False)
    assert file.stat().st_size > 10_000
    shorter = [points(0.2, 0.5), points(0.4, 0.7, 0.9)]
    assert curve_rule.mean_curve(shorter) == [[0, 0, 0, pytest.approx(0.3)], [5, 1280, 1, pytest.approx(0.6)]]


def test_rows_of_several_places_become_one_table(tmp_path):
    def write(place, *rows):
        (tmp_path / place).mkdir()
        (tmp_path / place / "curve.json").write_text(json.dumps({"device": "H100", "rows": rows}))

    def row(side, seed, right, steps=70, keys=()):
        each = 5 if side == curve.THEIRS else 1
        curve_ = [[step, 256 * step, 0.3 * step, right] for step in range(10, steps + 1, 10)]
        more = {"sampled": [right] * (steps // each), "keys": list(keys), "beside_others": True}
        return {"variant": side, "seed": seed, "curve": curve_, **more}

    write("a", *(row(curve.OURS, seed, 0.5 + 0.1 * seed) for seed in (1, 2, 3)), row(curve.OURS, 4, 0.9, steps=40))
    other = row(curve.OURS, 1, 0.1, keys=["a=b"])
    write("b", row(curve.OURS, 1, 0.8), *(row(curve.THEIRS, seed, 0.5) for seed in (1, 2, 3)), other)
    found = curve_summary.join([tmp_path], "curve")
    assert curve_summary.join([tmp_path], "curve_plain") is None
    *rows, last = found["rows"]
    assert [(r["variant"], r["seed"], r["curve"][0][3]) for r in rows][:5] == [
        ("TRL", 1, 0.5), ("TRL", 2, 0.5), ("TRL", 3, 0.5), ("ilr-fast", 1, 0.8), ("ilr-fast", 2, 0.7),
    ]  # fmt: skip
    assert last["status"] == "compared" and last["shape"].startswith("3 seeds")
    lines = list(curve_summary.table(found["rows"]))
    ours = next(line for line in lines if line.startswith("| ilr-fast |"))
    assert "| 4 | 80.0 (67.0 to 93.0), 4 |" in ours and ours.endswith("| 76.7 (62.3 to 91.0), 3 | – |")  # of 70 steps
    assert any(line.startswith("| ilr-fast, a=b | 1 | – |") for line in lines)
    (against,) = [line for line in curve_summary.table(found["rows"], "TRL") if line.startswith("| ilr-fast |")]
    assert "+26.7 (+12.3 to +41.0), 3" in against
