"""Self-ranking: an agent orders windows of questions from the easiest to the hardest (ILR.md, section 1).

Each question appears in R windows of W, in shuffled order. A ranking that can't be read is asked for once more, sampled
instead of greedy, and then left out. What has been asked is kept on disk window by window (ranking_cache.py).

    difficulty = asyncio.run(self_ranking(questions, seat, prompts, config.difficulty, seed=0, cache=cache))
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Sequence

from ilr_fast.config import DifficultyConfig
from ilr_fast.difficulty import Difficulty, from_rankings
from ilr_fast.protocols.templates import Prompts
from ilr_fast.ranking_cache import RankingCache
from ilr_fast.rollout import Seat, request_seed
from ilr_fast.types import Message, Question, Sampling

NUMBER = r"(?<![0-9])([0-9]{1,4})(?![0-9])"
ITEM = rf"(?:(?:questions?|problems?|numbers?|no\.?|q)\s*)?[\[(#*]*\s*{NUMBER}\s*[\])*]*[.:]?"
BETWEEN = r"\s*(?:,?\s*(?:and\s+)?(?:finally|then|next|lastly|followed\s+by|and)\b,?|->|=>|[,;><≤<→|/-]+|\n|\s)\s*"
CHAIN = re.compile(rf"(?<![\w.]){ITEM}(?:{BETWEEN}{ITEM})*(?!\w)", re.IGNORECASE)
LISTED = re.compile(rf"^ ?[*-]? ?{NUMBER} ?[.):] ?\** ?(\S.*)$", re.MULTILINE)
LONGEST = 5000  # characters of an answer that are read: its end


def windows(question_ids: Sequence[str], window: int, repeats: int, seed: int) -> list[tuple[str, ...]]:
    """Windows of `window` distinct questions (all where there are fewer); each question is in `repeats` of them.

    The last window of a pass is filled up with questions of the same pass, which so appear once more. None at all for
    fewer than two questions: there is nothing to compare.
    """
    size = min(window, len(question_ids))
    if size < 2:
        return []
    made = []
    for number in range(repeats):
        order = list(question_ids)
        random.Random(request_seed(seed, "windows", number)).shuffle(order)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            made.append(tuple(chosen + order[: size - len(chosen)]))
    return made


def parse_ranking(text: str, count: int) -> tuple[int, ...] | None:
    """The order of 1 … `count` that a text gives, prose around it forgiven; None where it gives none, or several.

    >>> parse_ranking("I think: [3] > [1] > [2], as 3 is a bare sum.", 3)
    (3, 1, 2)
    """
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text[-LONGEST:]))
    for read in (_numbered_list, _last_chain, _bare_mentions):
        order = read(text, count)
        if order is not None:
            return order
    return None


def _numbered_list(text: str, count: int) -> tuple[int, ...] | None:
    """"1. Question 3 / 2. Question 1 / …": the ranks stand at the left, the questions behind them."""
    rows = LISTED.findall(text)[-count:]
    if [int(rank) for rank, _ in rows] != list(range(1, count + 1)):
        return None
    named = [re.match(rf"{ITEM}(?![\w.]*\s*[-+*/=×])", rest, re.IGNORECASE) for _, rest in rows]
    return _order([int(match[1]) for match in named if match], count)


def _last_chain(text: str, count: int) -> tuple[int, ...] | None:
    """The last run of numbers with nothing but separators between them that holds exactly one order."""
    for chain in reversed([[int(n) for n in re.findall(NUMBER, match[0])] for match in CHAIN.finditer(text)]):
        orders = {_order(chain[start : start + count], count) for start in range(len(chain) - count + 1)} - {None}
        if len(orders) == 1:
            return orders.pop()
    return None


def _bare_mentions(text: str, count: int) -> tuple[int, ...] | None:
    """Every number mentioned once: their order in the text."""
    return _order([int(n) for n in re.findall(rf"(?<![\w.]){NUMBER}(?!\w|\.\d)", text)], count)


def _order(numbers: Sequence[int], count: int) -> tuple[int, ...] | None:
    return tuple(numbers) if sorted(numbers) == list(range(1, count + 1)) else None


async def self_ranking(
    questions: Sequence[Question],
    seat: Seat,
    prompts: Prompts,
    config: DifficultyConfig,
    *,
    seed: int,
    cache: RankingCache | None = None,
    on_done: Callable[[int], object] | None = None,
) -> Difficulty:
    """The agent's own D for every question. `on_done` is called with the number of windows that are ready."""
    by_id = {question.id: question for question in questions}
    wanted = windows(list(by_id), config.window, config.repeats, seed)
    known = cache.read(wanted) if cache else {}

    async def rank(number: int, ids: tuple[str, ...]) -> Sequence[str] | None:
        if number in known:
            return known[number]
        ranking, answered = await _ask([by_id[i] for i in ids], number, seat, prompts, config, seed)
        known[number] = ranking
        if cache and answered:  # an engine that failed may answer the next time
            cache.append(number, ids, ranking)
        if on_done:
            on_done(len(known))
        return ranking

    rankings = await asyncio.gather(*(rank(number, ids) for number, ids in enumerate(wanted)))
    return from_rankings(list(by_id), rankings)


async def _ask(
    questions: Sequence[Question], number: int, seat: Seat, prompts: Prompts, config: DifficultyConfig, seed: int
) -> tuple[tuple[str, ...] | None, bool]:
    """One window's ranking as question ids: greedy first, sampled if that can't be read, then None; and whether the
    engine answered each time it was asked."""
    tokens = seat.chat.first([Message("user", prompts.ranking(questions))])
    room = seat.engine.max_context - len(tokens)
    if room < 1:
        return None, True
    answered = True
    for attempt, temperature in enumerate((0.0, 1.0)):
        sampling = Sampling(
            max_tokens=min(config.max_tokens, room), temperature=temperature, stop=seat.chat.stop_strings,
            seed=request_seed(seed, "ranking", number, attempt),
        )
        generation = await seat.engine.generate(tokens, sampling)
        answered = answered and generation.finish != "error"
        order = parse_ranking(generation.text, len(questions)) if generation.finish != "error" else None
        if order is not None:
            return tuple(questions[place - 1].id for place in order), True
    return None, answered
