"""What an evaluation asks: a benchmark's questions, the grader that they need, the worked examples before them.

    paper("gsm8k", config)                 a benchmark by name (benchmark_sets.py), with its own grader
    paper("test", config)                  a run's held-out questions
    paper("task:sums", config)             a generated task with its default options, by the grader of the kind it needs
    paper("mine.jsonl", config, limit=50)  any source of questions, by the run's grader
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ilr_fast.benchmark_sets import BENCHMARKS, load_benchmark
from ilr_fast.config import Config
from ilr_fast.data import TASK, TASK_SIZES, load_questions, load_splits
from ilr_fast.errors import UserError
from ilr_fast.evaluate import few_shot_examples, open_grader
from ilr_fast.gradable import check_gradable
from ilr_fast.protocols.templates import load_prompts
from ilr_fast.tasks import task_reward
from ilr_fast.types import Message, Question

NO_DATA = "none"  # stands where a config names no questions of its own


@dataclass(frozen=True, slots=True)
class Paper:
    """One benchmark for the agents of one config: its questions, the worked examples before them, the config with the
    benchmark's reward. `benchmark` is its name in results; a part of it has the limit in its name."""

    benchmark: str
    questions: Sequence[Question]
    examples: Sequence[Message]
    config: Config


def has_data(config: Config) -> bool:
    """Whether the config is a run's, with questions of its own."""
    return config.data.test != NO_DATA


def paper(name: str, config: Config, limit: int | None = None, *, where: str | None = None) -> Paper:
    """The first `limit` questions of a benchmark, with the run's worked examples where its form of answer is the same.

    `where` names the option or key in errors. Raises UserError, also where the grader can't work here.
    """
    where = where or f"--benchmarks {name}"
    reward = config.reward.name
    if name == "test":
        if not has_data(config):
            raise UserError("`test` are a run's held-out questions, and no run is named", where,
                            "name a benchmark or a JSONL file")
        questions = load_splits(config.data, config.seed)["test"][:limit]
    elif name in BENCHMARKS:
        options = config.evaluate
        questions = load_benchmark(name, folder=options.folder, limit=limit, seed=options.option_seed)
        reward = BENCHMARKS[name].reward
    elif name.startswith(TASK):
        reward = task_reward(name.removeprefix(TASK)) or reward
        questions = load_questions(name, limit=limit or TASK_SIZES["test"], split="test", seed=config.seed, where=where)
    else:
        questions = load_questions(name, limit=limit, split="test", seed=config.evaluate.option_seed, where=where)
        reward = "choice" if all("choices" in question.metadata for question in questions) else reward
    examples: Sequence[Message] = ()
    if reward == config.reward.name and has_data(config) and config.prompts.examples:
        train = load_splits(config.data, config.seed)["train"]
        prompts = load_prompts(config.prompts.file, reward)
        examples = few_shot_examples(train, config.prompts.examples, config.seed, prompts)
    config = replace(config, reward=replace(config.reward, name=reward))
    with open_grader(config) as grader:
        check_gradable(grader, questions, f"{where}, graded by {reward}")
    label = name if limit is None or name.startswith(TASK) else f"{name}[:{limit}]"  # never stands for the whole
    return Paper(label, questions, examples, config)
