"""Flash attention over a forest: in float64 with the kernel written out, and torch's own on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from ragged_softmax import RaggedSoftmax
from test_attention import CONFIGS, forest, tiny_model

from ilr_fast import attention, flash_attention
from ilr_fast.attention import pack_sequences, packed_forward
from ilr_fast.flash_attention import check, usable
from ilr_fast.tree_plan import tree_plan

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


@pytest.mark.parametrize("window", [None, 2, 4, 200])
def test_forest_against_softmax(window: int | None) -> None:
    assert check(torch.device("cpu"), torch.float64, 8, window, RaggedSoftmax()) < 1e-12


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_by_differences(window: int | None) -> None:
    plan = tree_plan([(3, [2, 1]), (0, [2])])
    torch.manual_seed(0)
    q, k, v = (torch.randn(plan.tokens, h, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        segments = plan.segments(torch.device("cpu"))
        return flash_attention.flash_attention(q, k, v, segments, 0.5, window, RaggedSoftmax())

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gemma2"])
def test_models_give_what_single_sequences_give(name: str, share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "usable", lambda *arguments: True)
    monkeypatch.setattr(flash_attention, "TorchFlash", RaggedSoftmax)
    model, sequences = tiny_model(name).double(), forest()
    plain = copy.deepcopy(model)
    packed = pack_sequences(sequences, share_prefixes=share)
    hidden_TD = packed_forward(model, packed.tokens_T, packed.positions_T, packed.plan)
    loss, expected_loss = hidden_TD.new_zeros(()), hidden_TD.new_zeros(())
    for tokens, rows in zip(sequences, packed.index_S, strict=True):
        expected = plain.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        weights = torch.randn_like(expected)
        loss, expected_loss = loss + (hidden_TD[rows] * weights).sum(), expected_loss + (expected * weights).sum()
    loss.backward()
    expected_loss.backward()
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:  # rotary angles and norms are float32 inside
            error = float((ours.grad - theirs.grad).norm() / theirs.grad.norm())
            assert error < 1e-5, f"gradient of {key}: {error}"


def test_stems_are_gathered_once_a_node() -> None:
    plan = tree_plan([(4, [2, 1, 3]), (0, [3])])
    segments = plan.segments(torch.device("cpu"))
    assert segments.rows_N is not None and plan.gathered == 4 + 6 + 5 + 7 + 3
    assert segments.starts_q.tolist() == [0, 4, 6, 7, 10, 13]
    assert segments.starts_k.tolist() == [0, 4, 10, 15, 22, 25]
    assert segments.rows_N.tolist()[4:10] == [0, 1, 2, 3, 4, 5]
    ones = torch.ones(plan.gathered, 1, 1)
    once, twice = segments.add_up(ones, 2 * ones)
    assert once.flatten().tolist() == [4.0] * 4 + [1.0] * 9 and torch.equal(twice, 2 * once)
    alone = tree_plan([(0, [3]), (0, [2])]).segments(torch.device("cpu"))
    assert alone.rows_N is None and alone.starts_k.tolist() == [0, 3, 5]


def test_masks_are_for_what_the_kernel_can_not() -> None:
    plan, query = tree_plan([(4, [2, 1])]), torch.zeros(1, 2, 7, 64, dtype=torch.bfloat16)
    assert not usable(plan, query, 64, None, 0.0)  # no GPU
    assert plan.gathered == 4 + 6 + 5


def test_the_first_look_at_the_kernel_leaves_no_trace_in_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "TorchFlash", RaggedSoftmax)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x), torch.no_grad():
        assert flash_attention._agrees.__wrapped__(torch.device("cpu"), torch.float64, 8)
    assert not kept


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_torchs_kernel_on_the_gpu(size: int, window: int | None) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert check(torch.device("cuda"), dtype, size, window) < 0.01
