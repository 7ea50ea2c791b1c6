"""Plain sampling in vLLM by one reading of the logits instead of six.

For a token of softmax(logits / temperature) and its log-prob vLLM copies the logits, adds noise, looks for the largest,
reads them twice for the log-softmax and once more for the token's rank. Requests that ask for anything else (top-k,
penalties, …) are sampled by vLLM's own sampler; a request's tokens do not depend on whether such ones are beside it.

    install(runner)          # vLLM's second model runner, on a GPU, with float32 logits
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import torch
from ilr_kernels.sample import sample
from torch import Tensor


def install(runner: Any) -> bool:
    """Whether the runner's sampler is replaced: one whose parts and calls are known here; else a warning says so."""
    sampler: Any = getattr(runner, "sampler", None)
    if not _is_known(sampler):
        name = f"{type(sampler).__module__}.{type(sampler).__qualname__}"
        warnings.warn(f"vLLM samples by its own kernels, which takes longer: {name} is not known", stacklevel=2)
        return False
    runner.sampler = PlainSampler(sampler, sampler.sampling_states)
    return True


def _is_known(sampler: Any) -> bool:
    """Whether it has what PlainSampler uses and is called as that is, in vLLM 0.25 and 0.32 alike."""
    states = getattr(sampler, "sampling_states", None)
    parts = all(hasattr(states, name) for name in ("temperature", "seeds", "num_logprobs", "max_num_reqs"))
    if not parts or not hasattr(sampler, "req_states") or getattr(sampler, "compute_nans", True):
        return False
    called, told = (list(inspect.signature(f).parameters) for f in (sampler, sampler.add_request))
    return called == ["logits", "input_batch"] and told[:1] == ["req_idx"] and told[-1] == "sampling_params"


class PlainSampler:
    """Stands for vLLM's sampler."""

    def __init__(self, sampler: Any, states: Any):
        self._sampler, self._states = sampler, states
        self._plain = np.zeros(states.max_num_reqs, bool)
        self._changed = True  # there are requests that the GPU was not told of
        self._ranks_S = torch.zeros(states.max_num_reqs, dtype=torch.int64)  # nobody reads them
        self._none_S = torch.zeros(states.max_num_reqs, dtype=torch.int32, device=states.temperature.gpu.device)
        self._one_S = self._none_S + 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def add_request(self, place: int, *given: Any) -> None:
        """A request takes a place; its parameters are given last, by vLLM 0.25 after the prompt's length."""
        self._sampler.add_request(place, *given)
        self._plain[place], self._changed = _is_plain(given[-1]), True

    def apply_staged_writes(self) -> None:
        """Tells the GPU of new requests; vLLM copies all places' parameters at every step."""
        if self._changed:
            self._sampler.apply_staged_writes()
        self._changed = False

    def __call__(self, logits_NV: Tensor, batch: Any) -> Any:
        """vLLM's output for a step's N requests."""
        plain_N = self._plain[batch.idx_mapping_np]
        if logits_NV.dtype != torch.float32 or len(logits_NV) != len(plain_N) or not plain_N.any():
            return self._sampler(logits_NV, batch)
        positions_N = batch.positions[batch.logits_indices]
        temperature_S, seed_S = self._states.temperature.gpu, self._states.seeds.gpu
        if plain_N.all():
            return self._output(batch, *sample(logits_NV, batch.idx_mapping, temperature_S, seed_S, positions_N))
        output = self._sampler(logits_NV, batch)
        rows = torch.as_tensor(np.flatnonzero(plain_N), device=logits_NV.device)
        places = batch.idx_mapping[rows]
        tokens, logps = sample(logits_NV[rows], places, temperature_S, seed_S, positions_N[rows])
        output.sampled_token_ids[rows, 0] = tokens
        output.logprobs_tensors.logprobs[rows, 0] = logps
        return output

    def _output(self, batch: Any, tokens_N: Tensor, logp_N: Tensor) -> Any:
        from vllm.v1.outputs import LogprobsTensors
        from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
        from vllm.v1.worker.gpu.sample.output import SamplerOutput

        sampled, rejected = self._one_S[: batch.num_reqs], self._none_S[: batch.num_reqs]
        if (batch.num_computed_tokens_np + batch.num_scheduled_tokens < batch.prefill_len_np).any():
            sampled, rejected = get_num_sampled_and_rejected(
                sampled.clone(),
                batch.seq_lens,
                batch.cu_num_logits,
                batch.idx_mapping,
                self._sampler.req_states.prefill_len.gpu,
            )
        tokens_N1 = tokens_N.view(-1, 1)
        return SamplerOutput(
            sampled_token_ids=tokens_N1,
            logprobs_tensors=LogprobsTensors(tokens_N1, logp_N.view(-1, 1), self._ranks_S[: batch.num_reqs]),
            num_nans=None,
            num_sampled=sampled,
            num_rejected=rejected,
        )


def _is_plain(one: Any) -> bool:
    """Whether a request is sampled from the softmax of its logits alone and wants that token's log-prob."""
    shaped = (
        one.top_p != 1 or one.top_k > 0 or one.min_p or one.min_tokens or one.presence_penalty or one.frequency_penalty
    )
    changed = one.repetition_penalty != 1 or one.logit_bias or one.allowed_token_ids or one.bad_words
    more = one.prompt_logprobs is not None or getattr(one, "logprob_token_ids", None)
    return one.logprobs == 0 and not shaped and not changed and not more
