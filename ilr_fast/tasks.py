"""Generated problems. A task is a generator of a few lines that yields problems for a seed, for as long as it is asked:

    def doubles(seed: int, *, high: int = 500) -> Iterator[Question]:
        rng = random.Random(seed)
        while True:
            n = rng.randint(1, high)
            yield problem(f"What is twice {n}?", str(2 * n))

In a module of your own it is the source `task:my_module:doubles`, its arguments are `data.task_options`. Ids, splits
and repetitions are looked after here: training, validation and test come from seeds of their own and share no problem,
not even in another order. `task:largest`, `task:smallest`, `task:sums` and `task:reasoning_gym:NAME` are there already.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ilr_fast.errors import UserError, nearest
from ilr_fast.own import load_own
from ilr_fast.types import Question

Task = Callable[..., Iterator[Question]]

SHARE_HELD_OUT = 4  # the test problems are at most one in four: three times as many remain
_DRAWS = 50  # problems drawn for each one wanted, before the task counts as exhausted
_CHUNK = 500  # reasoning-gym's data sets have a size; one after the other is taken


def problem(
    text: str, answer: str, *, canonical: str | None = None, solution: str | None = None, **metadata: Any
) -> Question:
    """A generated problem. `canonical` is equal for problems that are the same in another order.

    Left out, it is the text's words in alphabetical order: 12 + 7 and 7 + 12 are one problem (and so are 12 - 7 and
    7 - 12, which costs nothing but one of them). `solution` is what a worked example may show; left out, the answer.
    """
    canonical = canonical or _in_any_order(text)
    return Question("", text, answer, solution=solution or answer, canonical=canonical, metadata=metadata)


def largest(
    seed: int, *, numbers: int = 3, most: int | None = None, low: int = 10, high: int = 999
) -> Iterator[Question]:
    """Which number is the largest: 436, 760, 20?

    With `most`, a problem has `numbers` to `most` numbers, drawn evenly; its level counts them from `numbers` = 1.
    """
    most = numbers if most is None else most
    if numbers < 2 or most < numbers or high - low + 1 < most:
        raise ValueError(f"needs 2 or more different numbers of {low} to {high}, not {numbers} to {most}")
    rng = random.Random(seed)
    while True:
        count = numbers if most == numbers else rng.randint(numbers, most)
        drawn = rng.sample(range(low, high + 1), count)
        text = f"Which number is the largest: {', '.join(map(str, drawn))}?"
        made = problem(text, str(max(drawn)), canonical=f"largest {sorted(drawn)}")
        yield made if most == numbers else replace(made, level=count - numbers + 1)


def sums(seed: int, *, low: int = 1, high: int = 99, numbers: int = 2, words: bool = False) -> Iterator[Question]:
    """What is 12 + 7 + 30? The solution adds one number after the other: 12 + 7 = 19, 19 + 30 = 49.

    With `words` a sentence of 44 tokens says each: Step 1 of 2: we take what we have so far, …, so 12 + 7 = 19.
    """
    if high < low:
        raise ValueError(f"low = {low} lies above high = {high}")
    if numbers < 2:
        raise ValueError(f"a sum of {numbers} numbers: give 2 or more")
    rng = random.Random(seed)
    while True:
        drawn = [rng.randint(low, high) for _ in range(numbers)]
        totals = list(itertools.accumulate(drawn))
        steps = list(zip(totals, drawn[1:], totals[1:], strict=False))
        told = ", ".join(f"{a} + {b} = {c}" for a, b, c in steps)
        if words:
            told = " ".join(_spoken(f"Step {at} of {numbers - 1}", *step) for at, step in enumerate(steps, 1))
        text = f"What is {' + '.join(map(str, drawn))}?"
        yield problem(text, str(totals[-1]), canonical=f"sum {sorted(drawn)}", solution=told)


def _spoken(place: str, a: int, b: int, c: int) -> str:
    return (
        f"{place}: we take what we have so far, look for the next number that we did not use yet, "
        f"and add the two together, so {a} + {b} = {c}."
    )


def smallest(
    seed: int, *, numbers: int = 3, most: int | None = None, low: int = 10, high: int = 999
) -> Iterator[Question]:
    """Which number is the smallest: 436, 760, 20? `largest` asked the other way round: what transfers, what harms."""
    for question in largest(seed, numbers=numbers, most=most, low=low, high=high):
        text = question.text.replace("largest", "smallest")
        answer = min(re.findall(r"\d+", text), key=int)
        made = problem(text, answer, canonical=f"smallest {question.canonical}")
        yield replace(made, level=question.level)


def reasoning_gym(
    dataset: str, seed: int, *, levels: Sequence[Mapping[str, Any]] = (), **options: Any
) -> Iterator[Question]:
    """The problems of a reasoning-gym data set; `options` are its own. The entry goes along for its scorer.

    With `levels`, further options from the easiest to the hardest, each problem is of one of them, drawn evenly, and
    has its number as its level.
    """
    if levels:
        seeds = [_sub_seed(seed, f"level {number}") for number in range(len(levels))]
        sources = [reasoning_gym(dataset, s, **{**options, **one}) for s, one in zip(seeds, levels, strict=True)]
        rng = random.Random(seed)
        while True:
            level = rng.randrange(len(sources))
            yield replace(next(sources[level]), level=level + 1)
    library = _reasoning_gym()
    if dataset not in library.factory.DATASETS:
        hint = nearest(dataset, library.factory.DATASETS)
        raise UserError(f"reasoning-gym has no data set {dataset!r}", f"task:reasoning_gym:{dataset}", hint)
    for start in itertools.count(seed, _CHUNK):
        for entry in library.create_dataset(dataset, seed=start, size=_CHUNK, **options):
            yield problem(entry["question"], str(entry["answer"]), entry=entry)


def splits(
    task: str, sizes: Mapping[str, int], seed: int, options: Mapping[str, Any] | None = None
) -> dict[str, list[Question]]:
    """`sizes[name]` problems for each split, none shared or repeated, each split from a seed of its own.

    `task` is what follows `task:` in a source. The ids are `<task>/<split>/<number>`. Test problems do not depend on
    the sizes of the other splits. UserError for an unknown task or option, and where the task has fewer than four
    times as many problems as the split `test` asks for, or too few for all.
    """
    generator, where = find_task(task, options or {}), f"task:{task}"
    seen: set[str] = set()
    result = {}
    for split in sorted(sizes, key=_ORDER.index):
        drawn = _draw(generator(_sub_seed(seed, split)), sizes[split], seen, where)
        result[split] = [replace(q, id=f"{task}/{split}/{i:05d}") for i, q in enumerate(drawn)]
    _check_space(generator, seed, sizes.get("test", 0), seen, where)
    return {split: result[split] for split in sizes}


_ORDER = ("test", "validation", "train")


def find_task(task: str, options: Mapping[str, Any]) -> Task:
    """The generator that `task` names, with its options: a function of the seed. UserError where they don't fit."""
    where, (name, _, rest) = f"task:{task}", task.partition(":")
    if name == "reasoning_gym":
        return _tried(functools.partial(reasoning_gym, rest, **options), where)
    function = load_own(task, where) if rest else _BUILT_IN.get(task)
    if not callable(function):
        known = [*_BUILT_IN, "reasoning_gym:NAME", "your_module:function"]
        raise UserError(f"no task is called {task!r}", where, nearest(task, known))
    _check_names(function, options, where)
    return _tried(functools.partial(function, **options), where)


_BUILT_IN: dict[str, Task] = {"largest": largest, "smallest": smallest, "sums": sums}


def task_reward(task: str) -> str | None:
    """The grader that a task's answers need: `number` or `task`; None for a task of the user's own."""
    return "task" if task.startswith("reasoning_gym:") else ("number" if task in _BUILT_IN else None)


def _check_names(function: Task, options: Mapping[str, Any], where: str) -> None:
    _, *parameters = inspect.signature(function).parameters.values()  # the first is the seed
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for option in sorted(set(options) - set(known)):
        raise UserError(f"no option {option!r}", f"{where}, task_options", nearest(option, known))


def _tried(task: Task, where: str) -> Task:
    """`task`, after its first problem: options that don't fit are found before a model is loaded."""
    try:
        first = next(iter(task(0)), None)
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        reason = str(error) or "they contradict each other"
        raise UserError(f"the options don't fit: {reason}", f"{where}, task_options", "correct them") from error
    if not isinstance(first, Question):
        raise UserError(f"it yields {type(first).__name__}", where, "yield ilr_fast.tasks.problem(text, answer)")
    return task


def _draw(problems: Iterator[Question], count: int, seen: set[str], where: str) -> list[Question]:
    """The first `count` problems that are not in `seen` yet, which they join."""
    drawn: list[Question] = []
    for question in itertools.islice(problems, _DRAWS * count):
        if len(drawn) == count:
            break
        if _key(question) not in seen:
            seen.add(_key(question))
            drawn.append(question)
    if len(drawn) < count:
        remedy = "make data.train_size, validation_size or test_size smaller, or widen data.task_options"
        raise UserError(f"it has only about {len(seen)} different problems", where, remedy)
    return drawn


def _check_space(generator: Task, seed: int, held_out: int, seen: set[str], where: str) -> None:
    """A test set must not be most of what there is: then training has all but seen it."""
    wanted = SHARE_HELD_OUT * held_out
    for question in itertools.islice(generator(_sub_seed(seed, "space")), _DRAWS * wanted):
        if len(seen) >= wanted:
            return
        seen.add(_key(question))
    if len(seen) < wanted:
        remedy = f"use data.test_size = {len(seen) // SHARE_HELD_OUT} at most, or widen data.task_options"
        raise UserError(f"{held_out} test problems of about {len(seen)} that there are", where, remedy)


def _key(question: Question) -> str:
    return question.canonical or _in_any_order(question.text)


def _in_any_order(text: str) -> str:
    return " ".join(sorted(re.findall(r"\w+|[^\w\s]", text.casefold())))


def _sub_seed(seed: int, split: str) -> int:
    """A seed of 31 bits: reasoning-gym counts on from it, and some of its data sets take 32."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{split}".encode()).digest()[:4], "big") >> 1


def _reasoning_gym() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError:
        raise UserError("the package reasoning-gym is not installed", "task:reasoning_gym",
                        "pip install 'ilr-fast[tasks]'") from None  # fmt: skip
