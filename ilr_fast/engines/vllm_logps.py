"""vLLM's log-probs: of float32 logits on a GPU, and how far the engine is from itself.

vLLM's LM head rounds its logits to the weights' precision: in bfloat16 one between 16 and 32 by up to 1/16, which is
most of what an engine's and a trainer's log-probs differ by. `float32_logits` lets the product give the float32 sums
that it has anyway; sampled is then from them, and the log-probs are theirs. For an exact engine (`TrainersLogps`) the
log-probs are computed once more by the trainer's own kernel, from the hidden states that the logits were of.

What is left is the order of sums: a token decoded in a batch of others and the same token in a prompt have hidden
states that differ in their last bits. `Noise` keeps some of the requests that were sampled and, asked for it, lets vLLM
compute their log-probs once more, as those of prompts: the mean |decoded − prefilled| is the least that a trainer with
kernels of its own can be expected to differ by.

    sample_in_float32(core)
    noise = Noise(core, requests)
    noise.keep(prompt, tokens, logps, temperature)       # as requests end
    noise.measure()                                      # nats, before the weights change
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ilr_kernels.lm_head_autograd import choose_sweep
from ilr_kernels.sweep import Head
from torch import Tensor, nn

from ilr_fast.attention import LMHead
from ilr_fast.engines.vllm_core import Core
from ilr_fast.engines.vllm_requests import Requests
from ilr_fast.engines.vllm_results import take_arrays

KEPT = 8  # requests
LONGEST = 1024  # tokens of one: as prompts their logits take up to so many rows of float32


def float32_logits(engine_model: nn.Module) -> Callable[[], None]:
    """From now on 16-bit models on a GPU give float32 logits; the function that is returned makes it as it was."""
    changed = []
    for processor in processors(engine_model):
        if _rounds(engine_model):
            processor._get_logits = _Float32Logits(processor.org_vocab_size)
            changed.append(processor)

    def undo() -> None:
        for processor in changed:
            del processor._get_logits

    return undo


def sample_in_float32(core: Core) -> None:
    """On a GPU: float32 logits, read once for the token and its log-prob (vllm_sampler.py)."""
    float32_logits(core.model)
    if next(core.model.parameters()).device.type == "cuda":
        from ilr_fast.engines.vllm_sampler import install  # it needs Triton

        install(core.worker.model_runner)
        take_arrays(core.worker.model_runner)


def processors(engine_model: nn.Module) -> list[Any]:
    """vLLM's modules between hidden states and logits."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    return [module for module in engine_model.modules() if isinstance(module, LogitsProcessor)]


def _rounds(engine_model: nn.Module) -> bool:
    weight = next(engine_model.parameters())
    return weight.device.type == "cuda" and weight.dtype.itemsize == 2


class _Float32Logits:
    """Stands for `LogitsProcessor._get_logits` on one GPU: soft-cap and scale come after it, in float32 then too."""

    def __init__(self, vocabulary: int):
        self._vocabulary = vocabulary
        self.hidden_ND: Tensor | None = None  # of the last call

    def __call__(self, hidden_ND: Tensor, lm_head: Any, bias_V: Tensor | None, *more: Any) -> Tensor:
        self.hidden_ND = hidden_ND
        logits_NV = torch.mm(hidden_ND, lm_head.weight.t(), out_dtype=torch.float32)
        if bias_V is not None:
            logits_NV += bias_V
        return logits_NV[:, : self._vocabulary]


class TrainersLogps:
    """Stands for vLLM's sampler: the log-probs of what it samples are `linear_logprob`'s, as in training.

    They come from the very hidden states that the logits were of, by a product of their own whose sums do not depend on
    the batch. `head` is the trainer's LM head, on the engine's device in bfloat16.
    """

    def __init__(self, runner: Any, engine_model: nn.Module, head: LMHead):
        (processor,) = processors(engine_model)
        self._logits: _Float32Logits = processor._get_logits
        self._sampler, self._head = runner.sampler, head
        runner.sampler = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, logits_NV: Tensor, input_batch: Any) -> Any:
        """vLLM's output for a step's N requests, its log-probs replaced."""
        output = self._sampler(logits_NV, input_batch)
        if output.logprobs_tensors is not None:
            hidden_ND, tokens_N = self._logits.hidden_ND, output.sampled_token_ids[:, 0].long()
            assert hidden_ND is not None and len(hidden_ND) == len(tokens_N)
            logp_N = output.logprobs_tensors.logprobs[:, 0]
            temperatures_N = self._sampler.sampling_states.temperature.np[input_batch.idx_mapping_np]
            for temperature in (found := np.unique(temperatures_N)):
                rows: Any = slice(None)
                if len(found) > 1:
                    rows = torch.as_tensor(np.flatnonzero(temperatures_N == temperature), device=hidden_ND.device)
                exactly = float(str(temperature))  # as it was before it became a float32
                logp_N[rows] = self._logps(hidden_ND[rows], tokens_N[rows], exactly or 1.0)
        return output

    def _logps(self, hidden_ND: Tensor, target_N: Tensor, temperature: float) -> Tensor:
        head = Head(self._head.weight, self._head.bias, temperature, self._head.softcap)
        return choose_sweep(hidden_ND, head.weight_VD)(head, hidden_ND, target_N, None, None).logp_N


class _Sampled(NamedTuple):
    """A request as it was decoded."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    logps: Sequence[float]


class Noise:
    """The engine's own difference between decoding and prefilling the same tokens with the same weights."""

    def __init__(self, core: Core, requests: Requests):
        self._core, self._requests = core, requests
        self._kept: list[_Sampled] = []
        self._temperature = 1.0

    def keep(self, prompt: Sequence[int], tokens: Sequence[int], logps: Sequence[float], temperature: float) -> None:
        """Keeps a request where there is room, if it is short enough and sampled at the temperature of the others."""
        longest = min(LONGEST, self._core.max_context - 1)
        if len(self._kept) == KEPT or not tokens or len(prompt) + len(tokens) > longest:
            return
        if not self._kept:
            self._temperature = temperature
        if temperature == self._temperature > 0:
            self._kept.append(_Sampled(prompt, tokens, logps))

    def forget(self) -> None:
        """The weights change: what was kept is of the old ones."""
        self._kept.clear()

    def measure(self) -> float | None:
        """Mean |decoded − prefilled log-prob| of the kept requests' sampled tokens, in nats; None where there are none.

        Nothing may be running in the engine. What was kept is forgotten.
        """
        kept, self._kept = self._kept, []
        if not kept:
            return None
        again = _prefilled(self._core, self._requests, [[*s.prompt, *s.tokens] for s in kept], self._temperature)
        differences = [
            abs(there - here)
            for sampled, logps in zip(kept, again, strict=True)
            for here, there in zip(sampled.logps, logps[-len(sampled.tokens) :], strict=True)
        ]
        return sum(differences) / len(differences)


def _prefilled(
    core: Core, requests: Requests, sequences: Sequence[list[int]], temperature: float
) -> list[list[float]]:
    """Log-probs of every token but the first of each sequence, computed as those of prompts."""
    scaled = processors(core.model)
    scales = [processor.scale for processor in scaled]
    for processor in scaled:
        processor.scale /= temperature  # vLLM's log-probs of prompts know no temperature
    try:
        names = [f"prefill-{number}" for number in range(len(sequences))]
        for name, tokens in zip(names, sequences, strict=True):
            core.client.add_request(requests.prompt_logps(name, tokens))
        found: dict[str, list[float]] = {}
        running = set(names)
        while running:
            for output in core.steps.step():
                if (there := output.new_prompt_logprobs_tensors) is not None:
                    found[output.request_id] = there.logprobs[:, 0].tolist()
                if output.finish_reason is not None:
                    running.discard(output.request_id)
    finally:
        for processor, scale in zip(scaled, scales, strict=True):
            processor.scale = scale
    return [found[name] for name in names]
