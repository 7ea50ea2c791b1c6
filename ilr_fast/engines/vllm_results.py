"""A step's sampled tokens as arrays from the GPU to the scheduler, where vLLM makes a list for every request.

    take_arrays(runner)          # vLLM's second model runner, of 0.25 or 0.32
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np

KNOWN = ["self", "model_runner_output", "sampler_output", "num_sampled_tokens", "main_stream", "copy_stream"]
LATER = ["check_ep_fault", "pending_aux_output"]  # of vLLM 0.32 beside
MORE = ("num_nans", "pending_aux_output", "sampling_mask_tensors", "_has_fault")  # None where there is nothing of it


class Sampled:
    """Each request's tokens, none or one; a list of them where a request is asked for, as vLLM does."""

    def __init__(self, tokens_N: np.ndarray, counts_N: np.ndarray):
        self.tokens_N, self._counts_N = tokens_N, counts_N

    def __len__(self) -> int:
        return len(self.tokens_N)

    def __getitem__(self, place: int) -> list[int]:
        return [int(self.tokens_N[place])] if self._counts_N[place] else []


def take_arrays(runner: Any) -> bool:
    """Whether the runner's results are arrays from now on: only where they are of a class that is known here."""
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    if list(inspect.signature(AsyncOutput.__init__).parameters) not in (KNOWN, KNOWN + LATER):
        return False
    theirs = runner.sample_tokens

    def sample_tokens(*arguments: Any, **named: Any) -> Any:
        output = theirs(*arguments, **named)
        if type(output) is AsyncOutput:
            output.__class__ = results_class()  # type: ignore[assignment]
        return output

    runner.sample_tokens = sample_tokens
    return True


@functools.cache
def results_class() -> Any:
    """vLLM's results of a step that are still on their way, which give arrays where one token was sampled for each."""
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    class Results(AsyncOutput):
        """See the module."""

        def get_output(self) -> Any:
            """Waits for the results."""
            prompts = self.prompt_logprobs_dict or getattr(self, "prompt_token_id_logprobs_dict", None)
            more = any(getattr(self, name, None) is not None for name in MORE)
            if prompts or more or self.logprobs_tensors is None or self.sampled_token_ids.shape[1] != 1:
                return super().get_output()
            self.copy_event.synchronize()
            output: Any = self.model_runner_output
            output.sampled_token_ids = Sampled(self.sampled_token_ids[:, 0], self.num_sampled_tokens_np)
            output.logprobs = self.logprobs_tensors.tolists()
            output.prompt_logprobs_dict = self.prompt_logprobs_dict
            return output

    return Results
