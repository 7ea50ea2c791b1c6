"""Which rows are sampled by one reading of the logits, and which by vLLM's sampler; the kernels are stood in for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

LOGITS = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0], [0.0, 1.0, 4.0]])


class Theirs:
    """A sampler of vLLM's that always gives token 0."""

    compute_nans = False

    def __init__(self) -> None:
        number = SimpleNamespace(gpu=torch.ones(8))
        self.sampling_states = SimpleNamespace(temperature=number, seeds=number, num_logprobs=None, max_num_reqs=8)
        self.req_states = SimpleNamespace(prefill_len=number)
        self.calls = self.told = 0

    def apply_staged_writes(self) -> None:
        self.told += 1

    def add_request(self, req_idx: int, prompt_len: int, sampling_params: Any) -> None: ...

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        self.calls += 1
        rows = len(logits)
        logprobs = SimpleNamespace(logprobs=torch.zeros(rows, 1))
        return SimpleNamespace(sampled_token_ids=torch.zeros(rows, 1, dtype=torch.long), logprobs_tensors=logprobs)


def batch_of(places: list[int]) -> Any:
    rows = len(places)
    return SimpleNamespace(
        idx_mapping_np=np.array(places), idx_mapping=torch.tensor(places), num_reqs=rows, seq_lens=torch.ones(rows),
        positions=torch.arange(rows), logits_indices=torch.arange(rows), cu_num_logits=torch.arange(rows + 1),
        num_computed_tokens_np=np.full(rows, 3), num_scheduled_tokens=np.full(rows, 1), prefill_len_np=np.full(rows, 4),
    )  # fmt: skip


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.v1.worker.gpu import input_batch

    from ilr_fast.engines import vllm_sampler

    monkeypatch.setattr(vllm_sampler, "sample", lambda x_NV, *_: (x_NV.argmax(-1), x_NV.log_softmax(-1).amax(-1)))
    monkeypatch.setattr(input_batch, "get_num_sampled_and_rejected", lambda ones, *_: (ones.zero_(), 0 * ones))
    runner = SimpleNamespace(sampler=Theirs())
    theirs = runner.sampler
    assert vllm_sampler.install(runner)
    return runner.sampler, theirs


def parameters(**more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"logprobs": 0, "temperature": 0.7, "seed": 3, **more})


def test_rows_that_are_sampled_plainly(replaced: Any) -> None:
    sampler, theirs = replaced
    for place in (5, 2, 7):
        sampler.add_request(place, 4, parameters())
    output = sampler(LOGITS, batch_of([5, 2, 7]))
    assert output.sampled_token_ids.tolist() == [[1], [0], [2]] and theirs.calls == 0
    assert torch.equal(output.logprobs_tensors.logprobs[:, 0], LOGITS.log_softmax(-1).amax(-1))
    sampler(LOGITS.bfloat16(), batch_of([5, 2, 7]))
    assert theirs.calls == 1, "the kernel reads float32"


def test_a_prompt_that_is_not_in_yet_samples_nothing(replaced: Any) -> None:
    """What vLLM's kernel says where a prompt's end is missing; else one for each, by the host."""
    sampler, _ = replaced
    for place in (5, 2):
        sampler.add_request(place, 4, parameters())
    for missing, sampled in ((0, 1), (1, 0), (0, 1)):
        batch = batch_of([5, 2])
        batch.prefill_len_np[1] += missing
        assert sampler(LOGITS[:2], batch).num_sampled.tolist() == [sampled] * 2


@pytest.mark.parametrize(
    "more",
    [
        dict(top_k=2), dict(top_p=0.5), dict(min_p=0.1), dict(repetition_penalty=1.2), dict(presence_penalty=1.0),
        dict(logprobs=2), dict(logprobs=None), dict(logit_bias={1: 2.0}), dict(min_tokens=3, max_tokens=9),
        dict(prompt_logprobs=0),
    ],
)  # fmt: skip
def test_others_are_vllms_and_change_nothing_beside_them(replaced: Any, more: dict[str, Any]) -> None:
    sampler, theirs = replaced
    for place, one in ((5, parameters()), (2, parameters()), (7, parameters(**more))):
        sampler.add_request(place, 4, one)
    output = sampler(LOGITS, batch_of([5, 7, 2]))
    assert output.sampled_token_ids.tolist() == [[1], [0], [2]] and theirs.calls == 1
    assert output.logprobs_tensors.logprobs[1, 0] == 0
    sampler.add_request(7, 4, parameters())  # another request takes the place
    sampler(LOGITS, batch_of([5, 7, 2]))
    assert theirs.calls == 1


def test_the_gpu_is_told_of_new_requests_once(replaced: Any) -> None:
    sampler, theirs = replaced
    for added, told in ((True, 1), (False, 1), (True, 2), (False, 2)):
        if added:
            sampler.add_request(1, 4, parameters())
        sampler.apply_staged_writes()
        assert theirs.told == told


def test_a_sampler_is_told_of_a_request_as_its_release_is(replaced: Any) -> None:
    """vLLM 0.32 leaves the prompt's length out."""
    sampler, theirs = replaced
    theirs.add_request = lambda req_idx, sampling_params: None
    sampler.add_request(5, parameters())
    sampler(LOGITS[:1], batch_of([5]))
    assert theirs.calls == 0


def test_the_release_here_is_known() -> None:
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    from ilr_fast.engines import vllm_sampler

    states = SimpleNamespace(temperature=None, seeds=None, num_logprobs=None, max_num_reqs=8)
    sampler: Any = object.__new__(Sampler)
    vars(sampler).update(sampling_states=states, req_states=None, compute_nans=False)
    assert vllm_sampler._is_known(sampler)


class CalledOtherwise(Theirs):
    """A later release whose sampler wants more."""

    def __call__(self, logits: torch.Tensor, input_batch: Any, more: Any = None) -> Any: ...


@pytest.mark.parametrize("theirs", [torch.nn.Identity(), CalledOtherwise()])
def test_a_sampler_that_is_not_known_stays_and_is_named(theirs: Any) -> None:
    from ilr_fast.engines.vllm_sampler import install

    runner = SimpleNamespace(sampler=theirs)
    with pytest.warns(UserWarning, match=type(theirs).__name__):
        assert not install(runner)
    assert runner.sampler is theirs
