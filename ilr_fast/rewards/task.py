r"""Generated tasks: reasoning-gym's own scorer, in a process that is killed when it overruns.

The question's metadata is the generated entry's own metadata (it names the task under "source_dataset"); a whole
entry under the key "entry" does as well. The answer is what stands in the last <answer>…</answer>, else in the last
\boxed{}, else the whole text. The asked form is the answer alone: in a tag or box, or as the text's only line.

    reward = the scorer's score, 0 to 1 (some tasks give part of it), plus `format_weight`; right means a score of 1

Some of the scorers hand the model's text to `eval` or to sympy's parser, which evaluates it too. In the verifier
process both are replaced by ones that take literals and arithmetic only (`safe_eval`, `safe_expression`): a text with
more in it scores 0.
"""

from __future__ import annotations

import ast
import base64
import importlib.util
import pickle
import re
import sys
from typing import Any

from ilr_fast.errors import UserError
from ilr_fast.rewards.base import BaseGrader, last_boxed
from ilr_fast.rewards.channel import Channel, Expired
from ilr_fast.rewards.pool import Broken, Pool, spawn_worker
from ilr_fast.types import Grade, Question

LONGEST_ANSWER = 20_000
ARITHMETIC = (
    ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.BinOp, ast.UnaryOp, ast.BoolOp,
    ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip
FUNCTIONS = re.compile(r"a?(?:sin|cos|tan)h?|cot|sec|csc|exp|log|ln|sqrt|[aA]bs|pi|[^\W_]")


class TaskGrader(BaseGrader):
    """reasoning-gym's scorers in `workers` processes of at most `memory_mib` each; `time_limit` seconds an answer."""

    def __init__(
        self, format_weight: float = 0.1, time_limit: float = 5.0, workers: int = 1, memory_mib: int = 2048
    ):
        super().__init__(format_weight, workers)
        if importlib.util.find_spec("reasoning_gym") is None:
            raise UserError("the package reasoning-gym is missing", "reward.name: task", "pip install reasoning-gym")
        self.time_limit, self._pool = time_limit, Pool(lambda: self._spawn(memory_mib), workers)

    def grade(self, question: Question, text: str) -> Grade:
        """Scores the answer found in the text; a question that names no task gives None."""
        answer, formatted = find_answer(text)
        entry = entry_of(question)
        if "source_dataset" not in entry["metadata"]:
            return self.broken(formatted, answer, "the question's metadata names no task (source_dataset)")
        if len(answer) > LONGEST_ANSWER:
            return self.verdict(False, formatted, answer, "answer too long")
        try:
            request = {"entry": base64.b64encode(pickle.dumps(entry)).decode(), "answer": answer}
            reply = self._pool.ask(request, self.time_limit)
        except Expired:
            return self.timed_out(formatted, answer, f"timeout: the scorer took more than {self.time_limit:g} s")
        except Broken as error:
            return self.broken(formatted, answer, str(error))
        if "limit" in reply:
            return self.timed_out(formatted, answer, f"{reply['limit']} in the scorer")
        if "broken" in reply:
            return self.broken(formatted, answer, reply["broken"])
        score = min(1.0, max(0.0, reply["score"]))
        reward = score + self.format_weight * formatted
        return Grade(reward, score == 1.0, formatted, answer[:200], reply.get("refused"))

    def close(self) -> None:
        """Kills the verifier processes."""
        self._pool.close()

    @staticmethod
    def _spawn(memory_mib: int) -> Channel:
        return spawn_worker("ilr_fast.rewards.task:verify", memory_mib)


def find_answer(text: str) -> tuple[str, bool]:
    """The answer in a text, and whether it stands in the asked form."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return text[start + len("<answer>") : end].strip(), True
    inside = last_boxed(text)
    if inside is not None:
        return inside, True
    stripped = text.strip()
    return stripped, bool(stripped) and "\n" not in stripped


def entry_of(question: Question) -> dict[str, Any]:
    """The entry as reasoning-gym made it."""
    if "entry" in question.metadata:
        return dict(question.metadata["entry"])
    return {"question": question.text, "answer": question.answer, "metadata": dict(question.metadata)}


class Refused(ValueError):
    """The answer holds more than literals and arithmetic."""


def safe_eval(text: str, *_namespaces: Any) -> Any:
    """`eval` of literals and arithmetic. Raises Refused for names, calls, attributes and everything else."""
    tree = ast.parse(text.strip(), mode="eval")
    if not all(isinstance(node, ARITHMETIC) for node in ast.walk(tree)):
        raise Refused("more than literals and arithmetic")
    return eval(compile(tree, "answer", "eval"), {"__builtins__": {}})


def safe_expression(text: str) -> str:
    """The text, if it is a formula: one-letter names and `FUNCTIONS`; no attributes, no strings, no other names."""
    names = re.findall(r"[^\W\d]\w*", text)
    formula = re.fullmatch(r"[\w\s+\-*/^().,!=]*", text) and not re.search(r"\.\s*[^\W\d]|__", text)
    if not formula or not all(FUNCTIONS.fullmatch(name) for name in names):
        raise Refused("not a formula")
    return text


def verify(request: dict[str, Any] | None) -> dict[str, Any]:
    """In the verifier process: the scorer's score of `answer` for the pickled `entry`. None only imports."""
    if request is None:
        _guard()
        return {}
    from reasoning_gym.factory import get_score_answer_fn

    entry = pickle.loads(base64.b64decode(request["entry"]))
    score = get_score_answer_fn(entry["metadata"]["source_dataset"])
    try:
        return {"score": float(score(request["answer"], entry))}
    except Exception as error:  # many scorers raise on a text of the wrong shape
        # one that raises on the right answer too is broken, and this raises again
        if not isinstance(error, Refused):
            score(entry["answer"], entry)
        return {"score": 0.0, "refused": f"{type(error).__name__}: {error}"[:200]}


def _guard() -> None:
    import sympy
    from sympy.parsing import sympy_parser

    parse = sympy_parser.parse_expr

    def guarded(text: str, *args: Any, **options: Any) -> Any:
        return parse(safe_expression(text), *args, **options)

    sympy_parser.parse_expr = sympy.parse_expr = guarded
    import reasoning_gym  # noqa: F401  (after the replacement: its modules copy the name)

    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym"):
            module.eval = safe_eval  # type: ignore[attr-defined]  # a module's own name comes before the builtin
