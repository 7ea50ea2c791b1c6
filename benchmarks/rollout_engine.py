"""The engines of the rollout benchmarks: how they are opened, whether they are right, and what rows are made of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from ilr_benchmarks.common import row
from ilr_benchmarks.rollout_load import NoText, random_model

from ilr_fast.types import Generation, Sampling

CONTEXT = 4096


def options(slots: int, quick: bool, cache_gib: float | None = None) -> Any:
    """By default 22 GiB of keys and values for 512 requests: more than they take."""
    from ilr_fast.engines.vllm_core import CoreOptions

    cache = cache_gib or (0.1 if quick else slots * 22 / 512)
    return CoreOptions(slots=slots, max_context=CONTEXT, cache_gib=cache)


def started(
    seconds: dict[str, float],
    family: str,
    settings: Any,
    quick: bool,
    device: str,
    imported: Callable[[], object] = lambda: None,
) -> tuple[Any, Any]:
    """The engine on its model, and what the parts of the start took; UserError where vLLM is missing.

    `imported` is called when vLLM is there and nothing of it has started.
    """
    from ilr_fast.engines.vllm import VllmEngine
    from ilr_fast.engines.vllm_core import check_version
    from ilr_fast.engines.vllm_process import import_vllm

    check_version("bench")
    _part(seconds, "importing vLLM", import_vllm)
    imported()
    model = _part(seconds, "random weights of the trainer", lambda: random_model(family, device, quick))
    engine = _part(
        seconds,
        "the engine",
        lambda: VllmEngine(model, NoText(), options=settings, seeded=False, where="bench"),
    )
    return engine, model


def error_of(engine: Any, model: Any) -> float:
    """Mean |Δ log-prob| between the engine and the trainer's forward pass, over 8 sequences of 32 sampled tokens."""
    g = np.random.default_rng(1)
    prompts = g.integers(0, model.config.vocab_size, (8, 40)).tolist()

    async def sampled() -> list[Generation]:
        return list(await asyncio.gather(*(engine.generate(p, Sampling(32, seed=n)) for n, p in enumerate(prompts))))

    results = asyncio.run(sampled())
    tokens = torch.tensor([[*p, *r.tokens] for p, r in zip(prompts, results, strict=True)], device=model.device)
    with torch.inference_mode():
        logits = model(tokens).logits[:, 39:-1].float()
        logps = logits.log_softmax(-1).gather(-1, tokens[:, 40:, None])[..., 0]
    return float((logps - torch.tensor([r.logps for r in results], device=model.device)).abs().mean())


def timed(work: Callable[[], Any], *engines: Any) -> float:
    """Seconds of `work`, without what rounds before left in the engines' caches."""
    for engine in engines:
        engine.weights_changed()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def speed(seconds: list[float], tokens: int) -> dict[str, float]:
    """Tokens per second, of the median."""
    return {"tokens_per_second": tokens / float(np.median(seconds))}


def ratio(
    variant: str, shape: str, theirs: list[float], ours: list[float], target: float | None = None
) -> Iterator[dict[str, Any]]:
    """A row with tokens/s of `ours` over those of `theirs`, for the same tokens."""
    found = float(np.median(theirs) / np.median(ours))
    told, more = f"{found:.3f} × its tokens/s", {}
    if target is not None:
        told, more = f"{told}, wanted ≥ {target:g}", {"met": found >= target}
    yield row(variant, shape, ours, limit_seconds=float(np.median(theirs)), ratio=found, target=told, **more)


def _part(seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - start
    return result
