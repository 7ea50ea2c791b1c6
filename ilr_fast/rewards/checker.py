"""Inside another jail: runs the tests, in a process that the program under test never touches.

The tests run as they are written, except that every expression that belongs to the program is evaluated in the
program's process, and only its value, as plain built-in data, comes back:

    assert set(f((3, 4), [5])) == {3, 5}    →    assert set(⟨f((3, 4), [5])⟩) == {3, 5}

So the program cannot pass by exiting early, printing, patching `assert`, builtins or modules, by an `__eq__` that is
always true, or by reading what is expected: none of it is in its process. An expression belongs to the program where
its first name does: one that is neither a builtin, nor imported, nor defined by the tests or a definition in their
set-up. A builtin's name belongs to the program only where the data's reference solution defines it too.
"""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

from ilr_fast.rewards.values import decode, encode

Ask = Callable[[dict[str, Any]], Any]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Checks one task after another. Its questions to the program and their answers go by the same pipes."""

    def ask(message: dict[str, Any]) -> Any:
        send({"ask": message})
        reply = json.loads(requests.readline())
        if "raise" in reply:
            kind = getattr(builtins, str(reply["raise"]), RuntimeError)
            is_error = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if is_error else RuntimeError)(f"{reply.get('text')}"[:200])
        return decode(reply["value"], lambda number: Remote(ask, int(number)))

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    for line in requests:
        task = json.loads(line)
        try:
            tests, setup, reference = _parse_trusted(task)
        except SyntaxError as error:
            send({"broken": f"the tests of the data do not parse: {error}"})
            continue
        send(check(task, tests, setup, reference, ask))


def _parse_trusted(task: dict[str, Any]) -> tuple[list[ast.Module], ast.Module, set[str]]:
    try:
        reference = defined(ast.parse(task["reference"]).body)
    except (SyntaxError, ValueError):
        reference = set()
    return [ast.parse(test.strip()) for test in task["tests"]], ast.parse(task["setup"]), reference


def check(
    task: dict[str, Any], tests: list[ast.Module], setup: ast.Module, reference: set[str], ask: Ask
) -> dict[str, Any]:
    """{"verdict": whether every test passed, "error": the first failure}."""
    setup.body = [node for node in setup.body if isinstance(node, DEFINITIONS)]
    bound = set().union(*(_bound(tree) for tree in (setup, *tests)))
    definitions = [node for tree in (setup, *tests) for node in tree.body if isinstance(node, DEFINITIONS)]
    split = Split((set(dir(builtins)) - reference) | bound, passed=bound - defined(definitions))
    namespace: dict[str, Any] = {
        "__name__": "tests",
        "__ask__": lambda source, **names: ask(
            {"op": "eval", "source": source, "names": {k: encode(v, _reference) for k, v in names.items()}}
        ),
    }
    stage = "the program"
    try:
        ask({"op": "run", "code": task["program"], "after": task["setup"]})
        for number, tree in enumerate((setup, *tests)):
            stage = f"test {number}"
            source = ast.fix_missing_locations(split.visit(tree))
            exec(compile(source, "tests", "exec"), namespace)
    except BaseException as error:  # what is raised here is a test that did not pass, SystemExit included
        return {"verdict": False, "error": f"{stage}: {type(error).__name__} {error}".strip()[:300]}
    return {"verdict": True, "error": None}


class Split(ast.NodeTransformer):
    """Replaces the largest expressions whose first name is not in `own` by `__ask__(source, name=value, …)`.

    Names in `passed` (variables of the tests) are sent along by value.
    """

    def __init__(self, own: set[str], passed: set[str]):
        self.own, self.passed = own, passed

    def visit(self, node: ast.AST) -> Any:
        """Replaces `node` or goes into it."""
        if isinstance(node, (ast.Call, ast.Attribute, ast.Subscript, ast.Name)) and self._is_remote(node):
            inside = _bound(node)
            names = sorted(
                {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in self.passed and n.id not in inside}
            )
            keywords = [ast.keyword(arg=name, value=ast.Name(name, ast.Load())) for name in names]
            return ast.Call(ast.Name("__ask__", ast.Load()), [ast.Constant(ast.unparse(node))], keywords)
        return self.generic_visit(node)

    def _is_remote(self, node: ast.expr) -> bool:
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            return False
        while not isinstance(node, ast.Name):
            if isinstance(node, ast.Call):
                node = node.func
            elif isinstance(node, (ast.Attribute, ast.Subscript)):
                node = node.value
            else:
                return False
        return node.id not in self.own


class Remote:
    """An object of the program that has no plain value. It can be called and passed back; it equals only itself."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: Ask, number: int):
        self._ask, self._number = ask, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encoded = {key: encode(value, _reference) for key, value in kwargs.items()}
        arguments = [encode(value, _reference) for value in args]
        return self._ask({"op": "call", "ref": self._number, "args": arguments, "kwargs": encoded})


def defined(body: Iterable[ast.stmt]) -> set[str]:
    """The names that these statements define at their own level."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def _bound(tree: ast.AST) -> set[str]:
    """The names bound anywhere in the tree."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, DEFINITIONS):
            names |= defined([node])
    return names


def _reference(value: Any) -> int:
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a test passes a {type(value).__name__}, which has no plain value, to the program")
