"""Layers of small micro-batches at fixed addresses: the same gradients, whatever the padding's memory holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gradient_cases import agent_of, distance, gradients, plain_gradients, rollout, small
from ragged_softmax import RaggedSoftmax

from ilr_fast import layer_graphs
from ilr_fast.agent import Agent
from ilr_fast.attention import pack_sequences
from ilr_fast.graph_sizes import SIZES
from ilr_fast.layer_graphs import LayerGraphs, Size, _FixedSegments
from ilr_fast.segments import make_segments

FAMILIES = ["llama", "qwen2", "qwen3", "smollm3", "mistral"]


@pytest.fixture
def flash_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed path on the CPU."""
    monkeypatch.setattr(layer_graphs, "usable", lambda *_: True)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def on_cpu(model: Any, most: int = 4096, **keys: Any) -> Agent:
    """An agent whose layers go through fixed tensors, launched one by one."""
    agent = agent_of(model, "cpu", fused_layers="on", **keys)
    agent.graphs = LayerGraphs(agent.model, most, RaggedSoftmax())
    return agent


def poison(agent: Agent) -> None:
    """Overwrites what a pass must not read, as far as it stays."""
    assert agent.graphs is not None
    for passes in agent.graphs._sizes.values():
        for fixed in (passes._x, passes._dy):
            fixed.fill_(float("nan"))
        passes._segments._all.fill_(-7)


@pytest.mark.parametrize(("family", "budget"), [*((family, 8192) for family in FAMILIES), ("qwen2", 300)])
def test_gradients_are_those_of_every_sequence_alone(
    family: str, budget: int, flash_written_out: None, poisoned: None
) -> None:
    model = small(family)
    agent = on_cpu(model, micro_batch_tokens=budget)
    for seed in (0, 1):
        sequences = rollout(prompt=30, longest=40, seed=seed)
        truth = plain_gradients(model, sequences, "cpu", torch.float32)
        ours = gradients(agent, sequences)
        assert ours.keys() == truth.keys()
        worst = {n: distance(ours[n], truth[n]) for n in truth}
        assert max(worst.values()) < 2e-5, worst
        poison(agent)
    assert agent.graphs is not None and agent.graphs._sizes


def test_micro_batches_that_are_too_large_add_to_the_same_gradients(flash_written_out: None) -> None:
    """Prompts of their own, so that a micro-batch of many tokens goes without graphs, and others with."""
    model = small("qwen2")
    sequences = rollout(prompt=30, longest=40) + rollout(prompt=250, longest=300, seed=1, questions=1, samples=3)
    agent = on_cpu(model, most=256, micro_batch_tokens=256)
    truth, ours = plain_gradients(model, sequences, "cpu", torch.float32), gradients(agent, sequences)
    assert agent.graphs is not None and {size.tokens for size in agent.graphs._sizes} == {256}
    assert all(distance(ours[n], truth[n]) < 2e-5 for n in truth)


def test_updates_move_the_weights_as_without(flash_written_out: None) -> None:
    model, sequences = small("llama"), rollout(prompt=30, longest=40)
    agents = agent_of(model, "cpu", fused_layers="on"), on_cpu(model)
    for step in (1, 2, 3):
        results = [agent.update(sequences, step) for agent in agents]
        assert results[0].metrics["loss"] == pytest.approx(results[1].metrics["loss"], rel=1e-4)
    one, other = (dict(agent.model.named_parameters()) for agent in agents)
    assert all(distance(one[n].detach(), other[n].detach()) < 1e-4 for n in one)
    assert all(p.grad is None for p in other.values())


def test_weights_that_moved_get_new_graphs(flash_written_out: None) -> None:
    model, sequences = small("llama"), rollout(prompt=30, longest=40)
    agent = on_cpu(model)
    assert agent.graphs is not None
    before = gradients(agent, sequences)
    sizes = dict(agent.graphs._sizes)
    gradients(agent, sequences)
    assert agent.graphs._sizes == sizes
    weight = agent.model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data.clone()
    after = gradients(agent, sequences)
    assert agent.graphs._sizes.keys() == sizes.keys() and agent.graphs._sizes != sizes
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_memory_that_runs_out_ends_them(flash_written_out: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences = small("llama"), rollout(prompt=30, longest=40)
    agent, calls = on_cpu(model), []

    def forward(*_: Any) -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(layer_graphs, "layer_forward", forward)
    assert agent.update(sequences, 1).skipped is None
    assert agent.graphs is None and len(calls) == 1


def test_one_backward_pass_comes_before_the_next_forward_pass(flash_written_out: None) -> None:
    agent = on_cpu(small("llama"))
    graphs = agent.graphs
    assert graphs is not None and agent.sinks is not None
    graphs.begin()
    agent.sinks.clear()
    with agent.sinks.open():
        first, second = (
            graphs.hidden(packed.tokens_T, packed.positions_T, packed.plan)
            for packed in (pack_sequences([[1, 2, 3]]), pack_sequences([list(range(300))]))
        )
        assert first is not None and second is not None
        second.sum().backward()
        with pytest.raises(AssertionError, match="another forward pass"):
            first.sum().backward()


def test_passes_without_a_gradient_have_none(flash_written_out: None) -> None:
    """Log-probs before the first of several updates (`loss.epochs`)."""
    agent = on_cpu(small("llama"))
    batch = agent._pack(rollout(prompt=30, longest=40), 8192).batches[0]
    agent._logp(agent.model, batch)
    assert agent.graphs is not None and not agent.graphs._sizes


@pytest.mark.parametrize("lengths", [[3], [255, 1], [256], [257], [1] * 200, [700, 30, 30]])
def test_a_size_holds_its_plan(lengths: list[int]) -> None:
    """Every row is a query once, in order, and a plan's own come first with its own keys."""
    plan = pack_sequences(
        [[*range(n)] if len(set(lengths)) > 1 else [i, *range(n)] for i, n in enumerate(lengths)]
    ).plan
    size = Size.of(plan)
    assert size.tokens in SIZES and size.tokens >= plan.tokens and size.longest % 128 == 0
    assert size == Size.of(plan) and all(x & (x - 1) == 0 for x in size[:3])
    fixed = _FixedSegments(size, torch.device("cpu"))
    fixed._all.fill_(-7)
    fixed.fill(plan)
    padded, own = fixed.value, make_segments(plan.key_runs(), plan.tokens, torch.device("cpu"))
    runs = len(own.starts_q) - 1
    assert padded.starts_q[: runs + 1].tolist() == own.starts_q.tolist()
    assert padded.starts_k[: runs + 1].tolist() == own.starts_k.tolist()
    assert padded.starts_q[-1] == size.tokens and bool((padded.starts_q.diff() >= 0).all())
    assert int(padded.starts_q.diff().max()) <= size.longest and int(padded.starts_k.diff().max()) <= size.longest
    x = torch.randn(size.tokens, 1, 2)
    assert torch.equal(padded.gather(x)[: plan.gathered], own.gather(x[: plan.tokens]))
    keys = torch.randn(size.keys, 1, 2)
    keys[int(padded.starts_k[-1]) :] = float("nan")  # what no run has
    summed, _ = padded.add_up(keys, keys)
    again, _ = own.add_up(keys[: plan.gathered], keys[: plan.gathered])
    assert torch.equal(summed[: plan.tokens], again) and bool(summed.isfinite().all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [8192, 300])
def test_replays_have_the_bits_of_the_launches(family: str, budget: int, poisoned: None) -> None:
    """The first pass of a size is launched, the second captured, the others replayed; on one set of weights."""
    agent = agent_of(small(family), "cuda", fused_layers="on", graph_tokens=4096, micro_batch_tokens=budget)
    found = []
    for seed in (0, 0, 1, 0, 1):
        found.append(gradients(agent, rollout(prompt=30, longest=40, seed=seed)))
        poison(agent)
    assert agent.graphs is not None
    assert any(all(passes._graphs) for passes in agent.graphs._sizes.values())
    for n in found[0]:
        assert torch.equal(found[0][n], found[1][n]) and torch.equal(found[0][n], found[3][n]), n
        assert torch.equal(found[2][n], found[4][n]), n


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_memory_that_runs_out_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update is taken again without graphs, and so are those that follow; nothing is left of the capture."""
    agent = agent_of(small("llama"), "cuda", fused_layers="on", graph_tokens=4096)
    sequences, real, layers = rollout(prompt=30, longest=40), layer_graphs.layer_backward, []
    without = gradients(agent, sequences)

    def backward(*arguments: Any) -> torch.Tensor:
        layers.append(torch.cuda.is_current_stream_capturing())
        if layers == [True, True]:
            raise torch.OutOfMemoryError("out of memory")
        return real(*arguments)

    monkeypatch.setattr(layer_graphs, "layer_backward", backward)
    again = gradients(agent, sequences)
    assert layers == [True, True] and agent.graphs is None
    assert not torch.cuda.is_current_stream_capturing()
    for found in (again, gradients(agent, sequences)):
        assert all(distance(found[n], without[n]) < 0.03 for n in without)
