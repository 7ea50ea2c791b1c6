"""Results of a step as arrays: what vLLM's scheduler asks of them, and when vLLM's own lists are left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM 0.25's class of results that are on their way, in short."""
    from vllm.v1.worker.gpu import async_utils

    from ilr_fast.engines import vllm_results

    class AsyncOutput:
        def __init__(
            self,
            model_runner_output: Any,
            sampler_output: Any,
            num_sampled_tokens: Any,
            main_stream: Any = None,
            copy_stream: Any = None,
        ):
            self.model_runner_output = model_runner_output
            self.sampled_token_ids, self.num_sampled_tokens_np = sampler_output, num_sampled_tokens
            self.num_nans, self.prompt_logprobs_dict = None, {}
            self.logprobs_tensors = SimpleNamespace(tolists=lambda: "log-probs")
            self.waits = 0
            self.copy_event = SimpleNamespace(synchronize=self.waited)

        def waited(self) -> None:
            self.waits += 1

        def get_output(self) -> Any:
            return "vLLM's own"

    monkeypatch.setattr(async_utils, "AsyncOutput", AsyncOutput)
    vllm_results.results_class.cache_clear()
    yield AsyncOutput
    vllm_results.results_class.cache_clear()


def results(kind: Any, tokens: list[list[int]], counts: list[int]) -> Any:
    from ilr_fast.engines.vllm_results import take_arrays

    made = kind(SimpleNamespace(), np.array(tokens), np.array(counts))
    runner = SimpleNamespace(sample_tokens=lambda grammar: made)
    assert take_arrays(runner)
    assert runner.sample_tokens(None) is made
    return made


def test_tokens_come_as_arrays_and_as_the_lists_that_are_asked_for(theirs: Any) -> None:
    one = results(theirs, [[5], [9], [7]], [1, 0, 1])
    output = one.get_output()
    assert output.sampled_token_ids.tokens_N.tolist() == [5, 9, 7] and len(output.sampled_token_ids) == 3
    assert [output.sampled_token_ids[n] for n in range(3)] == [[5], [], [7]]
    assert output.logprobs == "log-probs" and output.prompt_logprobs_dict == {} and one.waits == 1


def test_what_is_more_than_a_token_each_is_vllms(theirs: Any) -> None:
    assert results(theirs, [[5, 6]], [2]).get_output() == "vLLM's own"
    for more in (
        dict(num_nans=[0]), dict(prompt_logprobs_dict={"7": 0}), dict(logprobs_tensors=None),
        dict(pending_aux_output=1), dict(prompt_token_id_logprobs_dict={"7": 0}), dict(_has_fault=1),
    ):  # fmt: skip
        one = results(theirs, [[5]], [1])
        vars(one).update(more)
        assert one.get_output() == "vLLM's own"


def test_a_class_that_is_not_known_stays(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ilr_fast.engines.vllm_results import take_arrays

    monkeypatch.setattr(theirs, "__init__", lambda self, model_runner_output, pending: None)
    runner = SimpleNamespace(sample_tokens=len)
    assert not take_arrays(runner) and runner.sample_tokens is len


def test_the_release_here_is_known() -> None:
    from ilr_fast.engines.vllm_results import take_arrays

    assert take_arrays(SimpleNamespace(sample_tokens=len))
