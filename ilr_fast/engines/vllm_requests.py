"""Requests in the form that vLLM's core takes: token ids and sampling parameters.

    client.add_request(requests.sampling("7", tokens, Sampling(24, seed=1), limit=24))
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ilr_fast.engines.vllm_scheduler import READ
from ilr_fast.types import Generation, Sampling

SEEDS = 2**63 - 1  # vLLM's seeds are not negative
LONGEST = 2**32  # no prompt has so many tokens


@dataclass(slots=True, eq=False)
class Request:
    """What has come of one request: it may sample `limit` tokens and began with the weights `version`.

    `formed`: vLLM's own form of it, which can be made before it enters.
    """

    prompt: list[int]
    limit: int
    sampling: Sampling
    future: asyncio.Future[Generation]
    version: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    formed: Any = None


@dataclass(frozen=True, slots=True)
class Requests:
    """What all requests of an engine have in common; `lora` is vLLM's name for its adapter, None without one."""

    stop_tokens: Iterable[int] = ()
    seeded: bool = True
    lora: Any = None
    _known: dict[Any, Any] = field(default_factory=dict)  # vLLM's parameters, but for the limit and the seed

    def sampling(
        self, name: str, tokens: Sequence[int], sampling: Sampling, limit: int, ends: tuple[int, ...] = ()
    ) -> Any:
        """A request for at most `limit` tokens and their log-probs; `ends` are more tokens that end it.

        Later turns come first, then longer prompts: where running requests must make room, what has least behind it.
        """
        # Near the context's end every request has a limit of its own.
        kind = replace(sampling, max_tokens=1, seed=0, turn=0), ends
        if kind not in self._known:
            self._known[kind] = self._parameters(*kind)
        parameters = copy.copy(self._known[kind])  # vLLM looks at every stop token of those that it makes
        parameters.max_tokens = limit
        parameters.seed = sampling.seed & SEEDS if self.seeded and sampling.temperature > 0 else None
        return self._request(name, tokens, parameters, -(sampling.turn * LONGEST + len(tokens)))

    def _parameters(self, sampling: Sampling, ends: tuple[int, ...]) -> Any:
        from vllm.sampling_params import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=sorted({*self.stop_tokens, *ends}),
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            extra_args={READ: True} if sampling.stop else None,
        )

    def prompt_logps(self, name: str, tokens: Sequence[int]) -> Any:
        """A request for the log-probs of `tokens` as a prompt, from the second on; it reads nothing from the cache."""
        from vllm.sampling_params import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        return self._request(name, tokens, parameters, 0)

    def _request(self, name: str, tokens: Sequence[int], parameters: Any, priority: int) -> Any:
        from vllm.v1.engine import EngineCoreRequest

        return EngineCoreRequest(
            request_id=name,
            prompt_token_ids=list(tokens),
            mm_features=None,
            sampling_params=parameters,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=self.lora,
            cache_salt=None,
            data_parallel_rank=None,
            priority=priority,
        )
