"""Who gains and who loses by talking: worked by hand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ilr_fast.evaluate import Evaluation
from ilr_fast.evaluate_gains import gain_text, print_gains, with_gains


def measured(answers):
    """An evaluation from {(agent, mode): right or wrong by question}."""
    rows, files = [], {}
    for (agent, mode), right in answers.items():
        file = f"{mode}.jsonl"
        rows.append({"agent": agent, "method": "base", "benchmark": "b", "mode": mode, "samples": 1, "seed": 0,
                     "accuracy": sum(right) / len(right), "outcomes": file})  # fmt: skip
        files.setdefault(file, []).extend(
            {"agent": agent, "question": str(q), "correct": [bool(c)]} for q, c in enumerate(right)
        )
    return Evaluation(rows, files)


WEAK, STRONG = [0] * 60 + [1] * 40, [1] * 80 + [0] * 20
FOUND = measured({
    ("weak", "single"): WEAK, ("strong", "single"): STRONG,
    ("weak", "debate"): [1] * 40 + [0] * 20 + [1] * 40, ("strong", "debate"): [0] * 2 + [1] * 78 + [1] * 3 + [0] * 17,
    ("weak", "idea3"): [0] * 100, ("other", "idea3"): STRONG,
})  # fmt: skip


def test_differences_are_paired_and_within_the_interval_none():
    rows = {(r["agent"], r["mode"]): r.get("against_single") for r in with_gains(FOUND)}
    assert rows["weak", "single"] is None and rows["other", "idea3"] is None  # not measured alone
    gained = rows["weak", "debate"]
    assert gained["difference"] == pytest.approx(0.4) and gained["verdict"] == "better"
    assert (gained["only_together"], gained["only_alone"], gained["n"]) == (40, 0, 100)
    even = rows["strong", "debate"]
    assert (even["verdict"], even["only_together"], even["only_alone"]) == ("none", 3, 2)
    assert gain_text(even).startswith("none (") and "3 won, 2 lost" in gain_text(even)
    assert rows["weak", "idea3"]["verdict"] == "worse" and gain_text(rows["weak", "idea3"]).startswith("−40.0 (")


def test_the_table_has_agents_as_rows_and_modes_as_columns():
    out = io.StringIO()
    print_gains(Console(file=out, width=160), with_gains(FOUND))
    text = out.getvalue()
    assert text.index("single") < text.index("debate") < text.index("idea3") and text.count("weak") == 1
    assert "80.0" in text and "+40.0" in text
    out = io.StringIO()
    print_gains(Console(file=out), with_gains(measured({("a", "single"): [1]})))
    assert out.getvalue() == ""
