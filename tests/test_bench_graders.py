"""`ilr-fast bench graders` on a folder of a few rows: what is right, what is perturbed, and what is listed."""

from __future__ import annotations

import json

import pytest
from ilr_benchmarks import graders

from ilr_fast.cli import main


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        ("18", "19"),
        (r"\frac{3}{4}", r"\frac{4}{4}"),
        ("4343_6", "4344_6"),
        ("x", "x + 1"),
        ("Evelyn", r"\text{not Evelyn}"),
    ],
)
def test_perturbed_answers(answer, wrong):
    assert graders.perturbed(answer) == wrong


def test_programs_without_bodies_define_the_same_names():
    emptied = graders.without_bodies("import math\nclass A:\n    x = 1\ndef f(a):\n    return a\ny = f(1)\n")
    names: dict = {}
    exec(emptied, names)
    assert names["f"](1) is None and names["A"]() is None and "y" not in names
    assert graders.without_bodies("x = 1") == "pass"


def test_every_row_is_graded_and_what_is_wrong_is_listed(tmp_path, monkeypatch):
    rows = {
        "some_math.jsonl": [
            {"id": "a", "question": "?", "answer": r"\frac{1}{2}", "solution": r"So \boxed{0.5}."},
            {"id": "b", "question": "?", "answer": "7", "solution": r"So \boxed{8}."},
        ],
        "mbpp.jsonl": [{"id": "m", "question": "Twice?", "answer": "def f(n):\n    return 2 * n",
                        "test_list": ["assert f(2) == 4"]}],
    }  # fmt: skip
    for name, lines in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv("ILR_DATA", str(tmp_path))
    monkeypatch.setattr(graders, "HOSTILE", ("9^{9^{9^{9}}}",))
    monkeypatch.setattr(graders, "CALLS_LIMIT", 1e6)
    assert main(["bench", "graders", "--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "graders_quick.json").read_text())["rows"]
    by_check = {(row["shape"].split(",")[0], row["variant"].split(":")[0]): row for row in found}
    assert by_check["some_math", "gold answer by the verifier"]["error"] == 0
    (listed,) = by_check["some_math", "written solution"]["exceptions"]
    assert listed["id"] == "b" and listed["read"] == "8"
    assert by_check["some_math", "perturbed answer"]["error"] == 0
    for check in ("reference program, 60 s", "program that returns nothing"):
        assert by_check["mbpp", check]["error"] == 0
    monkeypatch.delenv("ILR_DATA")
    assert main(["bench", "graders", "--quick"]) == 2
