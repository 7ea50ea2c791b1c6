"""The sampler's distribution, its support under top-k and top-p, and its independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ilr_fast.engines.sampler import BLOCK, sample, uniforms
from ilr_fast.types import Sampling


def draw(logits_V: torch.Tensor, sampling: Sampling, number: int) -> tuple[np.ndarray, np.ndarray]:
    """`number` tokens and log-probs, by as many seeds."""
    samplings = [Sampling(1, sampling.temperature, sampling.top_p, sampling.top_k, seed=s) for s in range(number)]
    tokens, logps = sample(logits_V.repeat(number, 1), samplings, [5] * number)
    return np.array(tokens), np.array(logps)


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    """Standardized: about normal with mean 0 and deviation 1 where the counts follow `probs`."""
    cells = probs > 0
    assert counts[~cells].sum() == 0
    expected = probs[cells] * counts.sum()
    freedom = cells.sum() - 1
    return float((((counts[cells] - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("vocabulary", [40, BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_tokens_follow_the_softmax(vocabulary: int, temperature: float) -> None:
    logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    probs = (logits_V.double() / temperature).softmax(-1)
    tokens, logps = draw(logits_V, Sampling(1, temperature), 30_000)
    assert abs(chi_square(np.bincount(tokens, minlength=vocabulary), probs.numpy())) < 4
    assert logps == pytest.approx(probs.log().numpy()[tokens], abs=1e-5)


def test_greedy_takes_the_first_of_the_likeliest_at_temperature_1() -> None:
    logits_RV = torch.tensor([[0.0, 3.0, 3.0, 1.0], [9.0, 0.0, 0.0, 0.0]])
    tokens, logps = sample(logits_RV.clone(), [Sampling(1, temperature=0)] * 2, [0, 0])
    assert tokens == [1, 0]
    assert logps == pytest.approx(logits_RV.log_softmax(-1)[[0, 1], [1, 0]].tolist(), abs=1e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (7, 0.5), (0, 0.999), (1, 1.0), (0, 1e-9)])
@pytest.mark.parametrize("vocabulary", [64, 5000])
def test_top_k_and_top_p_keep_what_they_name_and_renormalize(top_k: int, top_p: float, vocabulary: int) -> None:
    scale = 1.5 if vocabulary == 64 else 0.3  # the second needs more candidates than are looked at first
    logits_V = scale * torch.randn(vocabulary, generator=torch.Generator().manual_seed(2))
    probs = logits_V.double().softmax(-1).numpy()
    order = np.argsort(-probs)
    kept = order[:top_k] if top_k else order
    cumulative = np.cumsum(probs[kept]) / probs[kept].sum()
    kept = kept[: int(np.searchsorted(cumulative, top_p)) + 1]
    restricted = np.zeros(vocabulary)
    restricted[kept] = probs[kept] / probs[kept].sum()
    tokens, logps = draw(logits_V, Sampling(1, top_p=top_p, top_k=top_k), 3000)
    counts = np.bincount(tokens, minlength=vocabulary)
    if len(kept) > 1:
        assert abs(chi_square(counts, restricted)) < 4
    assert set(tokens) <= set(kept)
    assert logps == pytest.approx(np.log(probs)[tokens], abs=1e-5), "log-probs are those before top-k and top-p"


def test_a_row_does_not_depend_on_the_others() -> None:
    g = torch.Generator().manual_seed(3)
    logits_RV = torch.randn(9, 700, generator=g)
    rules = [(1.0, 1.0, 0), (0.0, 1.0, 0), (0.8, 0.9, 0), (1.3, 1.0, 20), (0.5, 1.0, 0)]
    samplings = [Sampling(1, *rules[r % 5], seed=r) for r in range(9)]  # type: ignore[arg-type]
    together = sample(logits_RV.clone(), samplings, list(range(9)))
    alone = [sample(logits_RV[r : r + 1].clone(), samplings[r : r + 1], [r]) for r in range(9)]
    assert together == ([t for (t,), _ in alone], [logp for _, (logp,) in alone])


def test_uniforms_are_uniform_and_differ_by_seed_and_position() -> None:
    u = np.stack([uniforms([seed] * 100, range(100)) for seed in range(100)])
    assert u.min() >= 0 and u.max() < 1
    assert abs(chi_square(np.histogram(u, bins=50, range=(0, 1))[0], np.full(50, 0.02))) < 4
    assert len(np.unique(u)) == u.size
    assert np.abs(np.corrcoef(u)[~np.eye(100, dtype=bool)]).max() < 0.5
    assert uniforms([-3], [1]) == uniforms([2**64 - 3], [1])


def test_the_ends_of_the_unit_interval_never_give_an_impossible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_RV = torch.full((2, 1300), float("-inf"))
    logits_RV[:, [600, 700, 1200]] = torch.tensor([0.0, 1.0, 2.0])
    ends = np.array([0.0, 1 - 2.0**-52])
    monkeypatch.setattr("ilr_fast.engines.sampler.uniforms", lambda *_: ends)
    tokens, logps = sample(logits_RV, [Sampling(1)] * 2, [0, 0])
    assert tokens == [600, 1200] and np.isfinite(logps).all()


def test_logits_that_are_not_numbers_give_nan() -> None:
    logits_RV = torch.zeros(3, 10)
    logits_RV[1, 4] = float("nan")
    _, logps = sample(logits_RV, [Sampling(1), Sampling(1), Sampling(1, temperature=0)], [0, 0, 0])
    assert np.isnan(logps[1]) and logps[0] == logps[2] == pytest.approx(-np.log(10))
