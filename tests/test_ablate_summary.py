"""An ablation's table and figure from made-up runs: means over seeds, verdicts, what is not finished is left out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from made_up_runs import make_run
from rich.console import Console

from ilr_fast.ablate_figure import _draw_results, curves
from ilr_fast.ablate_summary import difference_text, main, summarise, table


@pytest.fixture
def folder(tmp_path):
    """Three seeds of ILR, which learns much, and of GRPO, which learns little; one ILR run was cut off."""
    for seed in (1, 2, 3):
        for method, lift in (("ilr", 0.4), ("grpo", 0.05)):
            made(tmp_path / f"{method}-seed{seed}", seed, method=method, lift=lift)
    made(tmp_path / "ilr-seed4", 4, method="ilr", steps=3, planned=9, evaluated=False)
    return tmp_path


def made(path: Path, seed: int, **keys) -> None:
    make_run(path, seed=seed, questions=200, **keys)
    rows = json.loads((path / "results.json").read_text()) if (path / "results.json").exists() else []
    (path / "config.yaml").write_text(
        yaml.safe_dump(yaml.safe_load((path / "config.yaml").read_text()) | {"data": {"test": "task:largest"}})
    )
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        for agent in row["agents"].values():
            agent["tokens_generated"] = 100
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    assert all("accuracy" in row for row in rows)


def test_rows_are_over_seeds_and_of_finished_runs(folder):
    out = io.StringIO()
    found = summarise(folder, command="ilr-fast ablate x", console=Console(file=out, width=200))
    assert json.loads((folder / "ablation.json").read_text()) == json.loads(json.dumps(found))
    rows = {(row["agent"], row["method"]): row for row in found["rows"]}
    ilr = rows["gemma", "ilr"]
    assert ilr["seeds"] == [1, 2, 3] and ilr["tokens_generated"] == 1400
    assert ilr["accuracy"] == pytest.approx(sum(ilr["accuracy_by_seed"].values()) / 3)
    assert ilr["against"]["grpo"]["verdict"] == "better" and ilr["against"]["grpo"]["difference"] > 0.2
    assert rows["gemma", "grpo"]["against"]["ilr"]["verdict"] == "worse"
    assert [run["finished"] for run in found["runs"] if run["seed"] == 4] == [False]
    assert "seeds 1, 2, 3" in out.getvalue() and "1,400" in out.getvalue()


def test_the_markdown_table_calls_what_is_within_the_interval_none(folder):
    found = summarise(folder, command="x")
    text = table(found["rows"])
    assert text.startswith("| agent | method | right |") and "| gemma | ilr |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1
    assert difference_text({"difference": 0.02, "ci95": (-0.01, 0.05), "verdict": "none"}) == "none (−1.0 to +5.0)"
    assert difference_text({"difference": -0.02, "ci95": (-0.05, -0.01), "verdict": "worse"}) == "−2.0 (−5.0 to −1.0)"


def test_the_figure_is_drawn_and_its_curves_are_of_first_answers(folder):
    pytest.importorskip("matplotlib")
    found = summarise(folder, command="x")
    assert (folder / "ablation.png").stat().st_size > 20_000
    steps, lines = curves([c for c in found["curves"] if (c["agent"], c["method"]) == ("gemma", "ilr")])
    assert steps == list(range(1, 15)) and len(lines) == 3
    assert curves([]) == ([], [])


@pytest.mark.parametrize(("base", "side"), [(0.2, "left"), (0.9, "right")])
def test_the_base_s_line_says_what_it_is_and_intervals_end_at_all(base, side):
    axis = pytest.importorskip("matplotlib.figure").Figure().subplots()
    rows = [{"method": method, "accuracy": accuracy, "ci95": (0.1, 1.3), "accuracy_by_seed": {"1": accuracy}}
            for method, accuracy in (("base", base), ("ilr", 0.6))]  # fmt: skip
    _draw_results(axis, rows, "ada")
    (name,) = axis.texts
    assert (name.get_text(), name.xy[0], name.get_ha()) == ("base", pytest.approx(100 * base), side)
    assert axis.get_xlim()[1] < 110


def test_runs_of_several_folders_make_one_table_and_a_repeated_one_counts_once(folder, tmp_path, capsys):
    more = tmp_path / "more"
    for seed in (3, 5):
        made(more / f"ilr-seed{seed}", seed, method="ilr", lift=0.4)
    assert main([str(folder), str(more), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())
    ilr = next(row for row in found["rows"] if row["agent"] == "gemma" and row["method"] == "ilr")
    assert ilr["seeds"] == [1, 2, 3, 5] and ilr["against"]["grpo"]["seeds"] == [1, 2, 3]
    assert len(found["runs"]) == 8 and "| gemma | ilr |" in capsys.readouterr().out
