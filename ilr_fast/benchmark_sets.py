"""The benchmarks that an evaluation names: where each one's questions are, and which grader they need.

    load_benchmark("math500", folder=Path("data"))      data/math500_test.jsonl
    load_benchmark("math500")                           the folder in $ILR_DATA, else HuggingFaceH4/MATH-500
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ilr_fast.errors import UserError, nearest
from ilr_fast.hub import hub_rows
from ilr_fast.rows import jsonl_rows, questions_of
from ilr_fast.types import Question


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`file` in the data folder, else `hub` (name[:config]) with its `hub_split` and columns; `reward` grades it.

    `without` are ids that are left out; `split`, where given, keeps the file's rows of that split.
    """

    file: str
    hub: str
    reward: str = "math"
    hub_split: str = "test"
    question_key: str = "question"
    answer_key: str = "answer"
    split: str | None = None
    without: frozenset[str] = frozenset()


# Four OlympiadBench problems are, but for a few words, problems of MATH's training set: after training on it they
# would count as learned. Left out for every model, so that accuracies stay comparable.
_NEAR_MATH = frozenset(f"olympiadbench/{number}" for number in (2607, 2713, 2791, 2890))

BENCHMARKS = {
    "gsm8k": Benchmark("gsm8k_test.jsonl", "openai/gsm8k:main"),
    "math500": Benchmark("math500_test.jsonl", "HuggingFaceH4/MATH-500", question_key="problem"),
    "minerva": Benchmark("minerva_math.jsonl", "math-ai/minervamath"),
    "olympiadbench": Benchmark(
        "olympiadbench.jsonl", "math-ai/olympiadbench", answer_key="final_answer", without=_NEAR_MATH
    ),
    "aime24": Benchmark("aime24.jsonl", "HuggingFaceH4/aime_2024", hub_split="train", question_key="problem"),
    "aime25": Benchmark("aime25.jsonl", "math-ai/aime25", question_key="problem"),
    "mbpp": Benchmark(
        "mbpp.jsonl", "google-research-datasets/mbpp:full", "code", question_key="text", answer_key="code", split="test"
    ),
    "gpqa": Benchmark("gpqa_diamond.jsonl", "Idavidrein/gpqa:gpqa_diamond", "choice", hub_split="train"),
    "mmlu_pro": Benchmark("mmlu_pro.jsonl", "TIGER-Lab/MMLU-Pro", "choice"),
}


def load_benchmark(
    name: str, *, folder: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Question]:
    """The questions of a named benchmark, the first `limit` of them; `seed` shuffles a multiple choice's options.

    From `folder` (default: the variable ILR_DATA), which must hold the file if it is given; else from the Hub.
    UserError for an unknown name, a missing file, or where the Hub can't be reached.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark is called {name!r}", "benchmarks", nearest(name, BENCHMARKS))
    benchmark, folder = BENCHMARKS[name], folder or os.environ.get("ILR_DATA")
    if folder:
        path = Path(folder).expanduser() / benchmark.file
        if not path.exists():
            remedy = f"put {benchmark.file} there, or leave evaluate.folder and ILR_DATA out to take it from the Hub"
            raise UserError(f"no file {path}", f"benchmark {name}", remedy)
        rows = jsonl_rows(path)
        wanted = benchmark.split
        questions = questions_of((row for row in rows if wanted is None or row[1].get("split") == wanted), name,
                                 seed=seed)
    else:
        rows = hub_rows(benchmark.hub, benchmark.hub_split, f"benchmark {name}")
        questions = questions_of(rows, name, benchmark.question_key, benchmark.answer_key, seed)
    return [question for question in questions if question.id not in benchmark.without][:limit]
