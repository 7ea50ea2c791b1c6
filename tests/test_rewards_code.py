"""Programs: where they stand in a text, how tests are split between the two jails, and MBPP's own solutions."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ilr_fast.errors import UserError
from ilr_fast.rewards import Grader, make_grader
from ilr_fast.rewards.checker import Split, check, defined
from ilr_fast.rewards.code import find_program
from ilr_fast.rewards.sandbox import Sandbox
from ilr_fast.rewards.values import decode, encode
from ilr_fast.types import Question


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    try:
        made = make_grader("code", time_limit=10, workers=2)
    except UserError as error:
        pytest.skip(str(error))
    with made:
        yield made


def question(*tests: str, setup: str = "", reference: str = "") -> Question:
    return Question(id="q", text="?", answer=reference, metadata={"test_list": tests, "test_setup_code": setup})


@pytest.mark.parametrize(
    ("text", "program", "formatted"),
    [
        ("Here:\n```python\ndef f(): pass\n```\nDone.", "def f(): pass", True),
        ("```\nx = 1\n```", "x = 1", True),
        ("```python\ndef f(): pass\n```\nUse it:\n```python\nprint(f())\n```", "def f(): pass", True),
        ("```python\ndef f(): pass\n```\nBetter:\n```py\ndef f(): return 1\n```", "def f(): return 1", True),
        ("def f(): pass", "def f(): pass", False),
        ("```python\ndef f(): pass", "def f(): pass", False),
    ],
)
def test_where_the_program_stands(text: str, program: str, formatted: bool):
    found, is_formatted = find_program(text)
    assert (found.strip(), is_formatted) == (program, formatted)


@pytest.mark.parametrize(
    ("test", "split"),
    [
        ("assert f(1) == 2", "assert __ask__('f(1)') == 2"),
        ("assert set(f((1, 2))) == set((1,))", "assert set(__ask__('f((1, 2))')) == set((1,))"),
        ("assert f(1)[0].x == g(2)", "assert __ask__('f(1)[0].x') == __ask__('g(2)')"),
        ("assert math.isclose(f(1), math.pi)", "assert math.isclose(__ask__('f(1)'), math.pi)"),
        ("assert f(math.pi)", "assert __ask__('f(math.pi)')"),
        ("assert f(root) == 1", "assert __ask__('f(root)') == 1"),
        ("assert all(f(i) == i for i in (1, 2))", "assert all((__ask__('f(i)', i=i) == i for i in (1, 2)))"),
        ("assert f([i for i in (1, 2)])", "assert __ask__('f([i for i in (1, 2)])')"),
        ("x = f(1)\nassert g(x) == x", "x = __ask__('f(1)')\nassert __ask__('g(x)', x=x) == x"),
        ("assert sum(1, 2) == 3", "assert __ask__('sum(1, 2)') == 3"),
        ("assert (lambda v: v)(f(1))", "assert (lambda v: v)(__ask__('f(1)'))"),
    ],
)
def test_expressions_of_the_program_go_to_the_program(test: str, split: str):
    own = {"set", "all", "math"}
    tree = ast.parse(test)
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    changed = Split(own | bound, passed=bound).visit(tree)
    assert ast.unparse(ast.fix_missing_locations(changed)) == split


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -7, 1 << 5000, 1.5, float("inf"), 1j, "é\ud800\n", b"\x00\xff", [1, [2, (3,)]], {1, 2},
        frozenset("ab"), {(1, 2): [3], "a": {}}, range(2, 9, 3), (), [],
    ],
)  # fmt: skip
def test_values_arrive_as_they_were(value: Any):
    data = json.loads(json.dumps(encode(value, lambda item: 0)))
    copy = decode(data, lambda number: None)
    assert copy == value and type(copy) is type(value)


def test_iterators_arrive_as_iterators_and_other_objects_as_references():
    assert list(decode(encode(map(str, (1, 2)), lambda item: 0), lambda number: None)) == ["1", "2"]
    kept: list[object] = []
    thing = object()
    data = encode([thing], lambda item: (kept.append(item), 5)[1])
    assert kept == [thing] and decode(data, lambda number: f"object {number}") == ["object 5"]


def test_the_program_is_never_told_what_is_expected():
    asked: list[dict] = []

    def ask(message: dict[str, Any]) -> Any:
        asked.append(message)
        return 987654321 if message["op"] == "eval" else None

    tests = [ast.parse("assert f(1, 2) == 987654321"), ast.parse("assert close(f(3), 987654321)")]
    setup = ast.parse("def close(a, b): return abs(a - b) < 1")
    task = {"program": "…", "setup": ast.unparse(setup)}
    assert check(task, tests, setup, set(), ask) == {"verdict": True, "error": None}
    assert [m["source"] for m in asked if m["op"] == "eval"] == ["f(1, 2)", "f(3)"]
    assert "987654321" not in json.dumps(asked)


def test_names_of_a_reference():
    source = "import a.b as c, d.e\nfrom f import g\nX, Y = 1, 2\nZ: int = 3\ndef h(): w = 1\nclass K: v = 1"
    assert defined(ast.parse(source).body) == {"c", "d", "g", "X", "Y", "Z", "h", "K"}


def test_right_and_wrong_programs(grader: Grader):
    asked = question("assert f(1, 2) == 3", "assert f(5, 5) == 10")
    pairs = [
        (asked, "```python\ndef f(a, b):\n    return a + b\n```"),
        (asked, "def f(a, b): return a + b"),
        (asked, "```python\ndef f(a, b):\n    return 3\n```"),
        (asked, "no program"),
        (asked, ""),
        (question(), "def f(): pass"),
        (question("assert f( == 1"), "def f(): pass"),
    ]
    assert [grade.reward for grade in grader.grade_many(pairs)] == [1.1, 1, 0.1, 0, 0, None, None]


def test_setup_runs_after_the_program_and_before_the_tests(grader: Grader):
    program = "class Node:\n    def __init__(self, v): self.v, self.left = v, None\ndef depth(n):\n"
    program += "    return 0 if n is None else 1 + depth(n.left)\ndef child(n): return n.left\n"
    setup = "root = Node(1)\r\nroot.left = Node(2)\r\n"
    tests = ["assert depth(root) == 2", "assert depth(child(root)) == 1", "n = child(root)\nassert depth(n) == 1",
             "assert root.left.v == 2"]  # fmt: skip
    assert grader.grade(question(*tests, setup=setup), program).reward == 1
    assert grader.grade(question("assert depth(root) == 3", setup=setup), program).reward == 0


def test_tests_of_many_shapes(grader: Grader):
    tests = [
        "import math\nassert math.isclose(half(1), 0.5)",
        "assert not empty([1]) and empty([])",
        "assert [half(i) for i in (2, 4)] == [1, 2]",
        "assert list(twice(i for i in (1, 2))) == [2, 4]",
        "try:\n    half('a')\n    assert False\nexcept TypeError:\n    pass",
        "def check(candidate):\n    assert candidate(4) == 2\ncheck(half)",
        "assert sorted(words('b a').items()) == [('a', 1), ('b', 1)]",
    ]
    program = """
from collections import Counter
def half(x): return x / 2
def empty(x): return not x
def twice(xs): return (2 * x for x in xs)
def words(s): return Counter(s.split())
if __name__ == "__main__":
    input("never asked")
"""
    grade = grader.grade(question(*tests), program)
    assert grade.reward == 1, grade.error


def test_a_builtins_name_is_the_programs_only_where_the_reference_defines_it(grader: Grader):
    program = "def sum(a, b): return a * b\ndef set(x): return 1\ndef f(x): return x"
    assert grader.grade(question("assert sum(3, 4) == 12", reference="def sum(a, b): return a * b"), program).correct
    assert not grader.grade(question("assert set(f((1, 2))) == set((3, 4))"), program).correct


def test_the_same_program_gets_the_same_grade(grader: Grader):
    order = question("assert first() == 'x'")
    grades = {grader.grade(order, "def first(): return next(iter({'x', 'y', 'z', 'w'}))").reward for _ in range(4)}
    assert len(grades) == 1


def test_without_a_sandbox_code_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Sandbox, "_try", lambda self: "unshare: Operation not permitted")
    with pytest.raises(UserError, match="cannot be confined.*not permitted"):
        make_grader("code")


@pytest.mark.data
@pytest.mark.skipif("ILR_DATA" not in os.environ, reason="ILR_DATA names no folder of data sets")
@pytest.mark.parametrize("name", ["mbpp_sanitized", "mbpp"])
def test_solutions_of_mbpp_pass_and_others_fail(grader: Grader, name: str):
    with open(Path(os.environ["ILR_DATA"]) / f"{name}.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for i, row in enumerate(rows) if i % (len(rows) // 30) == 0 or row.get("test_setup_code")]
    questions = [Question(id=row["id"], text=row["question"], answer=row["answer"], metadata=row) for row in rows]
    texts = [f"```python\n{row['code']}\n```" for row in rows]
    grades = grader.grade_many(list(zip(questions, texts, strict=True)))
    assert [(q.id, g.error) for q, g in zip(questions, grades, strict=True) if g.reward != 1.1] == []
    swapped = grader.grade_many(list(zip(questions, texts[1:] + texts[:1], strict=True)))
    assert not any(grade.correct for grade in swapped)
