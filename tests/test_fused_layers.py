"""Fused layers against transformers' own, in float64 and float32; their kernels against float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from gradient_cases import agent_of, distance, gradients, plain_gradients, rollout, small
from ilr_kernels.gated import gated, gated_backward_
from ilr_kernels.norm import rms_norm
from ilr_kernels.rotary import rotary
from ragged_softmax import RaggedSoftmax
from vllm_models import FAMILIES

from ilr_fast import flash_attention, fused_layers
from ilr_fast.activations import How, layer_bytes
from ilr_fast.attention import PackedSequences, pack_sequences, packed_forward
from ilr_fast.config import LoraConfig
from ilr_fast.fused_layers import fuse
from ilr_fast.fused_mlp import Gated
from ilr_fast.model_shape import shape_of
from ilr_fast.products import joined, linear


@pytest.fixture
def flash_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed path on the CPU."""
    monkeypatch.setattr(fused_layers, "usable", lambda plan, x, size, softcap, dropout, kernel: softcap is None)
    monkeypatch.setattr(flash_attention, "TorchFlash", RaggedSoftmax)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [8192, 300])
def test_gradients_of_every_family(
    family: str, budget: int, flash_written_out: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sequences = small(family), rollout(prompt=30, longest=40)
    truth, layers = plain_gradients(model, sequences, "cpu", torch.float32), []
    real = fused_layers.block_forward
    monkeypatch.setattr(fused_layers, "block_forward", lambda *a: (layers.append(1), real(*a))[1])
    ours = gradients(agent_of(model, "cpu", fused_layers="on", micro_batch_tokens=budget), sequences)
    assert ours.keys() == truth.keys()
    worst = {n: distance(ours[n], truth[n]) for n in truth}
    assert max(worst.values()) < 2e-5, worst
    assert bool(layers) != family.startswith("gemma")


@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
def test_micro_batches_may_go_module_by_module_before_others_do_not(
    family: str, flash_written_out: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sequences = small(family), rollout(prompt=30, longest=40)
    truth, plans = plain_gradients(model, sequences, "cpu", torch.float32), []

    def usable(plan: object, *rest: object) -> bool:
        if not any(plan is seen for seen in plans):
            plans.append(plan)
        return plan is not plans[0]

    monkeypatch.setattr(fused_layers, "usable", usable)
    ours = gradients(agent_of(model, "cpu", fused_layers="on", micro_batch_tokens=300), sequences)
    assert len(plans) > 1
    worst = {n: distance(ours[n], truth[n]) for n in truth}
    assert max(worst.values()) < 2e-5, worst


@pytest.mark.parametrize("how", ["on", "off"])
@pytest.mark.parametrize("again", ["mlp", True])
def test_what_is_computed_again_changes_nothing(how: str, again: str | bool, flash_written_out: None) -> None:
    model, sequences = small("gemma3"), rollout(prompt=30, longest=40)
    kept, other = (agent_of(model, "cpu", fused_layers=how, gradient_checkpointing=a) for a in (False, again))
    ours, truth = gradients(other, sequences), gradients(kept, sequences)
    assert max(distance(ours[n], truth[n]) for n in truth) < 1e-6


@pytest.mark.parametrize("how", ["on", "off"])
def test_less_is_kept_where_mlps_are_computed_again(how: str, flash_written_out: None) -> None:
    model, saved = small("llama", intermediate_size=1024), {}
    ids = pack_sequences([list(range(40))])
    for again in (False, "mlp", True):
        agent = agent_of(model, "cpu", fused_layers=how, gradient_checkpointing=again)
        saved[again] = kept_bytes(agent.model.train(), ids)
    assert saved[True] < saved["mlp"] < saved[False] / 2, saved


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("again", [False, "mlp"])
def test_what_is_kept_is_what_the_plan_counts(train: str, again: str | bool, flash_written_out: None) -> None:
    if train == "lora":
        pytest.importorskip("peft")
    model = small("llama", intermediate_size=512)
    agent = agent_of(
        model, "cpu", fused_layers="on", train=train, gradient_checkpointing=again, lora=LoraConfig(rank=1)
    )
    few, many = (kept_bytes(agent.model, pack_sequences([list(range(n))])) for n in (100, 300))
    how: How = "block" if train == "full" else "modules"
    counted = layer_bytes(shape_of(model.config), 4, how, again) * model.config.num_hidden_layers
    assert (many - few) / 200 == pytest.approx(counted, rel=0.1)


def kept_bytes(model: torch.nn.Module, packed: PackedSequences) -> int:
    """What is kept from forward to backward, each storage once, the model's own left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = packed_forward(model, packed.tokens_T, packed.positions_T, packed.plan)
    assert hidden.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_adapters_get_the_same_gradients(family: str, flash_written_out: None) -> None:
    pytest.importorskip("peft")
    model, sequences = small(family), rollout(prompt=30, longest=40)
    fused, plain = (agent_of(model, "cpu", train="lora", fused_layers=how) for how in ("on", "off"))
    for agent in (fused, plain):
        for name, parameter in agent.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    ours, truth = gradients(fused, sequences), gradients(plain, sequences)
    assert ours.keys() == truth.keys() and max(distance(ours[n], truth[n]) for n in truth) < 2e-5


def test_every_module_is_fused_where_it_is_known() -> None:
    for family in FAMILIES:
        model = small(family)
        fuse(model)
        fused = {type(m).__name__ for m in model.modules() if isinstance(vars(m).get("forward"), fused_layers._Bound)}
        whole = 0 if family.startswith("gemma") else 1  # norms inside the residual path
        assert len(fused) == 3 + whole, (family, fused)  # norms, attention, MLP
        layer = model.model.layers[0]
        attention, mlp = layer.self_attn, layer.mlp
        assert joined([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]) is not None
        assert joined([mlp.gate_proj.weight, mlp.up_proj.weight]) is not None


def test_a_copy_of_a_fused_model_computes_with_its_own_weights() -> None:
    model = small("qwen2")
    fuse(model)
    other, ids = copy.deepcopy(model), torch.tensor([[3, 4, 5]])
    before = model(ids).logits.detach()
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    torch.testing.assert_close(model(ids).logits, before)
    assert not torch.allclose(other(ids).logits, before, rtol=1e-2)


def test_weights_in_one_place_are_saved_one_by_one(tmp_path: Path) -> None:
    agent = agent_of(small("qwen2"), "cpu", fused_layers="on")
    agent.model.save_pretrained(tmp_path)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    own = agent.model.state_dict()
    assert own.keys() == saved.keys() and all(torch.equal(own[name], saved[name]) for name in own)
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 1.1 * 4 * agent.model.num_parameters()


@pytest.mark.parametrize("one_plus", [False, True])
def test_norm_by_differences(one_plus: bool) -> None:
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6, one_plus=one_plus), (x, w))


def test_rotary_by_differences() -> None:
    q, k = (torch.randn(3, h, 8, dtype=torch.float64, requires_grad=True) for h in (3, 1))
    cos, sin = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin), (q, k))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_backward_overwrites(activation: str) -> None:
    gate, up, dout = torch.randn(3, 5, 7, dtype=torch.float64).unbind()
    gate, up = gate.requires_grad_(), up.requires_grad_()
    out = Gated.apply(gate, up, activation)
    assert torch.autograd.gradcheck(lambda g, u: Gated.apply(g, u, activation), (gate, up))
    out.backward(dout)
    both = torch.cat([gate, up], 1).detach()
    g, u = both.chunk(2, -1)
    given = dout.clone()
    gated_backward_(g, u, given, activation)
    torch.testing.assert_close((g, u, given), (gate.grad, up.grad, gated(gate, up, activation)))


@pytest.mark.parametrize("apart", [(True, True), (True, False), (False, False)])
def test_gradients_made_apart_are_added_to(apart: tuple[bool, bool]) -> None:
    """A micro-batch that no flash kernel fits goes module by module; its gradients lie where autograd made them."""
    layers = [torch.nn.Linear(6, n, bias=False, dtype=torch.float64) for n in (4, 3)]
    first, second = torch.randn(2, 5, 6, dtype=torch.float64)
    for layer, made in zip(layers, apart, strict=True):
        if made:
            layer(first).pow(2).sum().backward()
    before = [
        torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad.clone() for layer in layers
    ]
    linear(second, layers).pow(2).sum().backward()
    for layer, earlier in zip(layers, before, strict=True):
        wanted = earlier + 2 * layer(second).detach().t() @ second
        torch.testing.assert_close(layer.weight.grad, wanted)
