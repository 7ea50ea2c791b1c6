"""vLLM as the rollout engine inside the trainer's process, on the trainer's own weights or a copy of them.

Requests go straight into vLLM's core, as token ids, and come back token by token: a dialogue's next turn enters the
running batch as soon as its peers' text is there, without a barrier between stages (admission.py says when exactly,
and who waits where not all fit). The core is stepped by a task of the caller's event loop, which gets its passes
between two steps and ends when there is nothing to do. On a GPU vLLM computes the next step while a step's results are
taken and the next turns come in. Prefixes are cached.

Log-probs are vLLM's `processed_logprobs`: of softmax(logits / temperature), at temperature 1 where greedy. With top-k
or top-p, which training does not use, they are of the restricted distribution.

Random numbers: with `seeded` each request has a generator of its own, from its seed, and the same requests in the same
order give the same tokens. That costs vLLM a small kernel for every running request and step; without it all requests
draw from torch's one generator, so that a request's tokens depend on its company.

    engine = VllmEngine(model, tokenizer, options=CoreOptions(slots=64), stop_tokens=[tokenizer.eos_token_id])
    generation = await engine.generate(tokens, Sampling(max_tokens=24, seed=1))
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from ilr_fast.engines.admission import Admission
from ilr_fast.engines.device_memory import OutOfMemory
from ilr_fast.engines.driver import Driver
from ilr_fast.engines.exact import trainers_kernel
from ilr_fast.engines.mistakes import failure_of, mistake_of
from ilr_fast.engines.stats import EngineStats
from ilr_fast.engines.stops import Decoder, StopStrings
from ilr_fast.engines.vllm_core import CoreOptions, open_core
from ilr_fast.engines.vllm_logps import Noise, sample_in_float32
from ilr_fast.engines.vllm_lora import Adapter
from ilr_fast.engines.vllm_requests import Request, Requests
from ilr_fast.errors import UserError
from ilr_fast.ticks import tick
from ilr_fast.types import FinishReason, Generation, Residence, Sampling
from ilr_fast.weights import check_shared, connect, extra_bytes

WAKING = "lower engine.cache_gib or micro_batch_tokens, set `engine.sleep: turns`, or free memory"


class VllmEngine:
    """An `Engine` (types.py) on vLLM for a transformers model, which may have adapters (peft) that are trained.

    `weights`: `share` makes `model`'s parameters views of the engine's, on the engine's device (CannotShare where that
    can't be); `copy` gives the engine its own; `auto` shares where it can. `device` is where the engine computes, the
    model's by default; with `share` the model may be elsewhere before and is on it afterwards. UserError: see
    engines/vllm_core.py.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Decoder,
        *,
        options: CoreOptions | None = None,
        weights: Literal["share", "copy", "auto"] = "share",
        stop_tokens: Iterable[int] = (),
        seeded: bool = True,
        device: torch.device | None = None,
        where: str = "vllm",
    ):
        device, options = device or model.device, options or CoreOptions()
        self._core = open_core(model, options, where, device)
        self.max_context = self._core.max_context
        self._model, self._where = model, where
        reload = self._core.reload if options.quantization else None
        self._copy = connect(model, self._core.model, weights, device, where, reload)
        self._adapter = None
        if hasattr(model, "peft_config"):
            self._adapter = Adapter(model, self._core.worker, where)
        sample_in_float32(self._core)
        self.kernel = trainers_kernel(model, self._core, options.exact, where)
        self._client = self._core.client
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self._stop_tokens = frozenset(stop_tokens)
        self._form = Requests(self._stop_tokens, seeded, self._adapter.request if self._adapter else None)
        self._noise = Noise(self._core, self._form)
        self._version = 0
        self._stops = StopStrings(tokenizer)
        self._requests: dict[str, Request] = {}
        self._unformed: deque[str] = deque()
        self._admission = Admission(options.tokens_in_flight or self._core.cache_tokens, options.slots)
        self._names = itertools.count()
        self._driver = Driver(self._take_step, lambda: [r.future for r in self._requests.values()], paced=not seeded)
        self._stats = EngineStats()
        self.residence: Residence = "awake"

    @property
    def shares(self) -> bool:
        """Whether the trainer's parameters are the engine's."""
        return self._copy is None

    def stats(self) -> EngineStats:
        """A snapshot of the counts."""
        return replace(self._stats, tokens_generated=self._stats.tokens_generated + self._core.steps.tokens_held())

    def cache_bytes(self) -> int:
        """Memory held for keys and values."""
        return self._core.cache_bytes

    def extra_weight_bytes(self) -> int:
        """Memory of the engine's weights that is not the trainer's too (padding, where they are shared)."""
        return extra_bytes(self._model, self._core.model)

    def weights_changed(self) -> None:
        """Brings changed weights to the engine and drops its prefix cache; running requests go on with the new ones."""
        self._version += 1
        self._noise.forget()
        if self._copy is None:
            check_shared(self._model, self._core.model, self._where)
        elif self._adapter is None:
            self._copy()
        if self._adapter is not None:
            self._adapter.write()
        if self._core.weights is not None and self._adapter is None:
            self._core.weights.changed()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # vLLM may compute on a stream of its own
        self.forget()

    def forget(self) -> None:
        """Drops the prefix cache; running requests begin again with what they have sampled."""
        self._take(self._core.steps.drain())
        self._client.reset_prefix_cache(reset_running_requests=True)

    def reside(self, residence: Residence) -> None:
        """See types.Engine. Only a GPU's memory moves, and only where the options say that the engine sleeps."""
        if residence != "awake":
            self._rest()
        try:
            if residence != "away":
                self._core.wake(cache=residence == "awake")
        except OutOfMemory as error:
            raise UserError(f"{error}, as its engine wakes", f"{self._where}.engine", WAKING) from None
        if residence == "away" and self._core.weights is not None:
            self._core.weights.release(keep=True)
        self.residence = residence

    def _rest(self) -> None:
        """Ends what nobody waits for, and gives keys and values back."""
        self._abort([n for n, r in self._requests.items() if r.future.done()])
        assert not self._requests, "an engine sleeps when nothing runs"
        self.forget()
        if self._core.cache is not None:
            self._core.cache.release(keep=False)

    async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Generation:
        """Samples a continuation of `tokens`; a request that fails gives `finish="error"`, never an exception.

        A generation that reaches `max_context` ends there with finish "length".
        """
        assert self.residence == "awake", "an engine generates when its memory is there"
        self._stats.requests += 1
        mistake = mistake_of(tokens, sampling, vocabulary=self._vocabulary, max_context=self.max_context)
        if mistake:
            self._stats.failed += 1
            return Generation((), (), "error", "", mistake)
        loop = asyncio.get_running_loop()
        limit = min(sampling.max_tokens, self.max_context - len(tokens))
        request = Request(list(tokens), limit, sampling, loop.create_future(), self._version)
        name = str(next(self._names))
        self._requests[name] = request
        self._unformed.append(name)
        self._stats.tokens_prompt += len(tokens)
        self._admission.add(name, prompt=len(tokens), limit=limit, turn=sampling.turn)
        self._driver.wake()
        return await request.future

    def noise(self) -> float | None:
        """Mean |log-prob| in nats by which vLLM differs from itself where it decodes and prefills the same tokens.

        Over some requests that were sampled with the present weights; None where there are none, or others still run.
        """
        self._take(self._core.steps.drain())
        return None if self._requests else self._noise.measure()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of the trainer's lies in memory that the engine gives back."""
        return self._core.weights is not None and self._core.weights.holds(tensor)

    def close(self) -> None:
        """Ends vLLM's core; its keys and values are freed, shared weights live on in the trainer."""
        self._fail(list(self._requests), "the engine was closed")
        self._core.close()

    async def _take_step(self) -> bool:
        """A step of vLLM's with what may enter, where there is work; whether there was."""
        self._abort([n for n, r in self._requests.items() if r.future.done()])  # cancelled, or of a closed loop
        if not self._requests:
            return False
        for name in self._admission.enter():
            self._client.engine_core.add_request(*self._formed(name))
        tick()
        start, steps = time.perf_counter(), self._core.steps
        try:
            beside = self._driver.others()
            self._take(await steps.step_beside(self._form_one) if beside else steps.step(self._form_one))
        except Exception as error:  # vLLM's own: out of memory, a kernel's refusal
            self._fail(list(self._requests), failure_of(error))
        self._stats.steps += 1
        self._stats.seconds += time.perf_counter() - start
        return True

    def _formed(self, name: str) -> Any:
        """vLLM's own form of a request, its blocks named."""
        request = self._requests[name]
        if request.formed is None:
            ends = self._stops.whole(request.sampling.stop)
            form = self._form.sampling(name, request.prompt, request.sampling, request.limit, ends)
            request.formed = self._client.engine_core.preprocess_add_request(form)
        return request.formed

    def _form_one(self) -> bool:
        """Forms a request that waits, where there is one; whether there was."""
        if not self._unformed:
            return False
        if (name := self._unformed.popleft()) in self._requests:
            self._formed(name)
        return True

    def _take(self, outputs: Iterable[Any]) -> None:
        """Adds what a step sampled to its requests and ends those that are complete."""
        stopped = []
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is None:  # given up
                self._stats.tokens_generated += len(output.new_token_ids)
                continue
            if not request.tokens:
                self._stats.tokens_reused += output.prefill_stats.num_cached_tokens if output.prefill_stats else 0
            if output.new_token_ids and self._append(output.request_id, request, output):
                stopped.append(output.request_id)
            elif output.finish_reason is not None and output.request_id in self._requests:
                last = request.tokens[-1] if request.tokens else None
                ended = last in self._stop_tokens or last in self._stops.whole(request.sampling.stop)
                self._finish(output.request_id, "stop" if ended else "length")
        self._abort(stopped)

    def _append(self, name: str, request: Request, output: Any) -> bool:
        """Adds new tokens; True where the request is over before vLLM knows it."""
        tokens, logps = output.new_token_ids, output.new_logprobs.logprobs[:, 0].tolist()
        if not math.isfinite(sum(logps)):
            self._fail([name], "the model's logits are not finite")
            return False
        before = len(request.tokens)
        request.tokens += tokens
        request.logps += logps
        self._stats.tokens_generated += len(tokens)
        if not request.sampling.stop:
            return False
        end = self._stops.first_end(request.tokens, before, request.sampling.stop, self._stop_tokens)
        if end is not None:
            del request.tokens[end:], request.logps[end:]
            self._finish(name, "stop")
        return end is not None

    def _finish(self, name: str, finish: FinishReason) -> None:
        """Hands over the result."""
        request = self._requests.pop(name)
        self._admission.leave(name, sampled=len(request.tokens))
        if request.version == self._version:
            self._noise.keep(request.prompt, request.tokens, request.logps, request.sampling.temperature)
        if not request.future.done():
            text = self._stops.before_stop(request.tokens, request.sampling.stop)
            request.future.set_result(Generation(tuple(request.tokens), tuple(request.logps), finish, text))

    def _fail(self, names: Iterable[str], message: str) -> None:
        """Ends requests with an error; what the cache holds of them is not good."""
        names = list(names)
        for name in names:
            self._stats.failed += 1
            future = self._requests[name].future
            if not future.done():
                future.set_result(Generation((), (), "error", "", message))
        self._abort(names)
        if names:
            self._client.reset_prefix_cache(reset_running_requests=True)

    def _abort(self, names: Sequence[str]) -> None:
        """Makes vLLM give up requests that it may still run."""
        if names:
            self._client.abort_requests(list(names))
            for name in names:
                if self._requests.pop(name, None) is not None:
                    self._admission.leave(name)
