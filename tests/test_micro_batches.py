"""Micro-batches: within the budget, full, even, with every sequence in one of them."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ilr_fast.batch import BatchRules, pack_step
from ilr_fast.micro_batches import fill
from ilr_fast.tree_plan import pack_sequences
from ilr_fast.types import TrainingSequence, TrainingTurn


def groups(lengths: np.ndarray, prompt: int = 80, samples: int = 16, seed: int = 0) -> list[np.ndarray]:
    """Questions of `prompt` tokens, the first 20 common to all, with `samples` answers each."""
    g = np.random.default_rng(seed)
    system = g.integers(0, 50_000, 20)
    questions = [np.append(system, g.integers(0, 50_000, prompt - 20)) for _ in range(len(lengths) // samples)]
    return [np.append(questions[i // samples], g.integers(0, 50_000, n)) for i, n in enumerate(lengths)]


def log_normal(count: int, seed: int = 0) -> np.ndarray:
    """Lengths of mean 300, at most 2,048."""
    drawn = np.random.default_rng(seed).lognormal(0, 0.8, count)
    return np.minimum(drawn / drawn.mean() * 300, 2048).astype(int) + 1


def sizes(sequences: list[np.ndarray], parts: list[list[int]]) -> list[int]:
    """What the packed rows really hold."""
    return [len(pack_sequences([sequences[s] for s in part]).tokens_T) for part in parts]


@pytest.mark.parametrize("budget", [4096, 8192, 16384])
def test_ragged_lengths_fill_micro_batches(budget: int) -> None:
    sequences = groups(log_normal(512))
    parts = fill(sequences, budget)
    assert sorted(s for part in parts for s in part) == list(range(512))
    packed = sizes(sequences, parts)
    assert max(packed) <= budget
    assert sum(packed) / (len(packed) * max(packed)) > 0.95
    alone = len(pack_sequences(sequences).tokens_T)
    assert sum(packed) < 1.05 * alone  # prefixes that several micro-batches hold


def test_equal_lengths_leave_no_small_rest() -> None:
    sequences = groups(np.full(33 * 16, 512))
    packed = sizes(sequences, fill(sequences, 8192))
    assert max(packed) <= 8192 and min(packed) > 0.8 * max(packed)


@pytest.mark.parametrize("seed", range(20))
def test_budgets_hold_whatever_is_shared(seed: int) -> None:
    g = np.random.default_rng(seed)
    sequences = [g.integers(0, 2, g.integers(1, 12)) for _ in range(40)]  # deep trees, duplicates, prefixes of others
    for budget in (12, 15, 40):
        parts = fill(sequences, budget)
        assert sorted(s for part in parts for s in part) == list(range(40))
        assert max(sizes(sequences, parts)) <= budget


def test_too_long_goes_alone() -> None:
    long, short = np.arange(30), np.arange(100, 104)
    assert sorted(map(len, fill([long, short, short + 10], 10))) == [1, 2]
    assert fill([], 10) == []


def test_packing_a_step_takes_a_hundredth_of_it() -> None:
    """512 sequences of 600 tokens: 20 ms on a server, less than 1% of 5 s; here the machine may be busy."""
    g = np.random.default_rng(0)
    made, logps = groups(np.full(512, 520)), (-1.0,) * 520
    sequences = [
        TrainingSequence(f"q{i // 16}", i % 16, tuple(tokens.tolist()), (TrainingTurn(80, 600, g.normal(), logps),))
        for i, tokens in enumerate(made)
    ]
    seconds = []
    for _ in range(3):
        start = time.process_time()
        pack_step(sequences, BatchRules(), 4096)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5
