"""The rollout engine inside the trainer's process: the agent's own model, continuous batching, no copy of the weights.

Every step is one packed forward pass over all tokens there are to process, without padding: one token for each running
request and the prompts of those that come in. A request enters as soon as a slot is free. Prefixes are computed once
and reused (batching.py, slots.py), the LM head runs only where a token is sampled, and of equal prompts once.

How far a request's tokens depend on it alone: its random numbers, its rule and its arithmetic in the sampler do wholly.
Its logits are matrix products whose summation order the BLAS library picks by the number of rows, so in fp32 they
move by about 1e-6 with the batch, and a token changes where its random number falls that near to a cell's border (some
1e-5 of the tokens); in bf16 more often. The same requests in the same order give the same bits: admission, slots
and batches follow from the order alone, never from the clock.

Why not transformers' own `generate_batch` (5.23)? It does run on the CPU and returns log-probs, but it has one seed for
all requests, so a request's tokens depend on its company; no stop strings; prefixes are shared by whole pages only, and
outlive an update of the weights; its manager is a thread of its own, so admission follows the clock; and for 64 samples
of 12 tokens (SmolLM2's shape, CPU) it took 2.3 to 3 times as long as this engine, longer than plain `generate`
(benchmarks/test_engine.py).

    engine = EmbeddedEngine(model, tokenizer, slots=64, stop_tokens=[tokenizer.eos_token_id])
    generation = await engine.generate(tokens, Sampling(max_tokens=24, seed=1))
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ilr_fast.attention import lm_head_of, packed_forward
from ilr_fast.engines.batching import Batcher, Request, Step
from ilr_fast.engines.cache import CachePlan, SlotCache
from ilr_fast.engines.driver import Driver
from ilr_fast.engines.mistakes import failure_of, mistake_of
from ilr_fast.engines.sampler import sample
from ilr_fast.engines.stats import EngineStats
from ilr_fast.engines.step_size import logit_rows, longest_request, prompt_tokens
from ilr_fast.engines.stops import Decoder, StopStrings
from ilr_fast.types import FinishReason, Generation, Residence, Sampling


class EmbeddedEngine:
    """An `Engine` (types.py) on a transformers model, full or peft-wrapped, in whatever mode it is left.

    `slots` requests run at once; a slot's memory grows with what it holds, up to `max_context` tokens of prompt and
    generation (default: the model's own limit). `stop_tokens` end a generation (finish "stop"): end of text and the
    template's end of turn. `token_budget` bounds the prompt tokens of one step (default: by the model's
    width, step_size.py); a longer prompt takes several.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Decoder,
        *,
        slots: int = 64,
        max_context: int | None = None,
        stop_tokens: Iterable[int] = (),
        token_budget: int | None = None,
    ):
        device = next(model.parameters()).device.type
        if token_budget is None:
            token_budget = prompt_tokens(device, model.config.get_text_config().intermediate_size)  # type: ignore[operator, union-attr]
        if slots < 1 or token_budget < 1:
            raise ValueError("slots and token_budget must be at least 1")
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
        self.max_context = longest_request(max_context, limit)
        self._model = model
        self._stop_tokens = frozenset(stop_tokens)
        self._stops = StopStrings(tokenizer)
        self._batcher = Batcher(slots, token_budget)
        self._cache = SlotCache(slots, self.max_context)
        self._logits: Tensor | None = None
        self._driver = Driver(self._take_step, self._waiting)
        self._stats = EngineStats()

    def stats(self) -> EngineStats:
        """A snapshot of the counts."""
        batcher = self._batcher
        return replace(self._stats, tokens_prompt=batcher.tokens_prompt, tokens_reused=batcher.tokens_reused)

    def cache_bytes(self) -> int:
        """Memory that keys and values take now."""
        return self._cache.bytes()

    def weights_changed(self) -> None:
        """Drops everything computed with the old weights and its memory; running requests go on with the new ones."""
        self.forget()

    def reside(self, residence: Residence) -> None:
        """See types.Engine. The weights are the trainer's own, and its host's to move."""
        if residence != "awake":
            self.forget()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor of the trainer's lies in memory that the engine gives back: none does."""
        return False

    def forget(self) -> None:
        """Drops keys and values and their memory; running requests go on."""
        self._batcher.forget()
        self._cache.release()
        self._logits = None

    async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Samples a continuation of `tokens`; a request that fails gives `finish="error"`, never an exception.

        A generation that reaches `max_context` ends there with finish "length".
        """
        self._stats.requests += 1
        vocabulary = lm_head_of(self._model).weight.shape[0]
        mistake = mistake_of(tokens, sampling, vocabulary=vocabulary, max_context=self.max_context)
        if mistake:
            self._stats.failed += 1
            return Generation((), (), "error", "", mistake)
        loop = asyncio.get_running_loop()
        limit = min(len(tokens) + sampling.max_tokens, self.max_context)
        request = Request(list(tokens), len(tokens), limit, sampling, loop.create_future())
        self._batcher.queue.append(request)
        self._driver.wake()
        return await request.future

    def _take_step(self) -> bool:
        """A step, where there is work; whether there was."""
        self._batcher.drop(lambda request: request.future.done())  # cancelled, or of a loop that was closed
        if self._batcher.idle:
            return False
        self.step()
        return True

    def _waiting(self) -> list[asyncio.Future[Generation]]:
        return [request.future for request in (*self._batcher.running, *self._batcher.queue)]

    def step(self) -> None:
        """One forward pass over all running requests and those that can enter; finished ones get their results."""
        start = time.perf_counter()
        step = self._batcher.schedule()
        try:
            self._sample(*self._forward(step))
        except Exception as error:  # the model's or the tokenizer's own: out of memory, a kernel's refusal
            failed = [r for r in step.requests if r in self._batcher.running]
            self._fail(failed, failure_of(error))
            self.weights_changed()  # what the cache holds is not known
        self._stats.steps += 1
        self._stats.seconds += time.perf_counter() - start

    def _forward(self, step: Step) -> tuple[list[Request], Tensor, list[int]]:
        """Runs the pass; the requests that sample, the distinct hidden rows to sample from, and each request's row."""
        device = next(self._model.parameters()).device
        order = sorted(step.pieces, key=lambda r: (step.pieces[r].new > 1, step.pieces[r].slot))
        pieces = [step.pieces[r] for r in order]
        tokens = [t for r, p in zip(order, pieces, strict=True) for t in r.tokens[p.past : p.past + p.new]]
        with torch.inference_mode(), _evaluating(self._model):
            plan = CachePlan(self._cache, pieces, step.copies, device)
            tokens_T = torch.tensor(tokens, device=device)
            hidden_TD = packed_forward(self._model, tokens_T, plan.positions_T, plan)
            last = np.cumsum([p.new for p in pieces]) - 1
            owners = [n for n, r in enumerate(order) if r.computed == len(r.tokens)]
            hidden_RD = hidden_TD[torch.as_tensor(last[owners], device=device)]
        row_of = {order[n]: row for row, n in enumerate(owners)}
        row_of |= {follower: row_of[leader] for follower, leader in step.shares_row_of.items()}
        return list(row_of), hidden_RD, list(row_of.values())

    def _sample(self, requests: list[Request], hidden_RD: Tensor, row_of: list[int]) -> None:
        at_once = logit_rows(hidden_RD.device.type, lm_head_of(self._model).weight.shape[0])
        for start in range(0, len(requests), at_once):
            part, part_rows = requests[start : start + at_once], row_of[start : start + at_once]
            with torch.inference_mode():
                logits_RV = self._logits_of(hidden_RD, part_rows)
                samplings = [r.sampling for r in part]
                tokens, logps = sample(logits_RV, samplings, [len(r.tokens) for r in part])
            for request, token, logp in zip(part, tokens, logps, strict=True):
                self._append(request, token, logp)

    def _logits_of(self, hidden_RD: Tensor, rows: list[int]) -> Tensor:
        """float32 logits of the given rows, in a buffer that is kept: fresh memory of this size costs as much again."""
        head = lm_head_of(self._model)
        distinct = sorted(set(rows))
        hidden = hidden_RD[distinct] if len(distinct) < len(hidden_RD) else hidden_RD
        shape = (len(distinct), head.weight.shape[0])
        if self._logits is None or self._logits.shape[0] < shape[0] or self._logits.dtype != head.weight.dtype:
            self._logits = torch.empty(shape, dtype=head.weight.dtype, device=hidden.device)
        logits = torch.mm(hidden, head.weight.t(), out=self._logits[: shape[0]])
        if head.bias is not None:
            logits.add_(head.bias)
        if len(distinct) < len(rows):
            place = {row: n for n, row in enumerate(distinct)}
            logits = logits[[place[row] for row in rows]]
        logits = logits.float()
        if head.scale != 1:
            logits.mul_(head.scale)
        return logits if head.softcap is None else logits.div_(head.softcap).tanh_().mul_(head.softcap)

    def _append(self, request: Request, token: int, logp: float) -> None:
        """Adds a sampled token and ends the request where it is the last."""
        if not math.isfinite(logp):
            self._fail([request], "the model's logits are not finite")
            return
        request.tokens.append(token)
        request.logps.append(logp)
        self._stats.tokens_generated += 1
        stop = request.sampling.stop
        if token in self._stop_tokens or (stop and self._stops.completed(request.sampled, stop)):
            self._finish(request, "stop")
        elif len(request.tokens) >= request.limit:
            self._finish(request, "length")

    def _finish(self, request: Request, finish: FinishReason) -> None:
        self._batcher.leave(request)
        if not request.future.done():
            tokens = request.sampled
            text = self._stops.before_stop(tokens, request.sampling.stop)
            request.future.set_result(Generation(tuple(tokens), tuple(request.logps), finish, text))

    def _fail(self, requests: Iterable[Request], message: str) -> None:
        for request in requests:
            self._batcher.leave(request, keep=False)
            self._stats.failed += 1
            if not request.future.done():
                request.future.set_result(Generation((), (), "error", "", message))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off for the pass; every module is left in the mode it was in."""
    training = [m for m in model.modules() if m.training] if model.training else []
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
