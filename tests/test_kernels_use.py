"""The kernel functions as users call them: autograd's ways, torch.compile, CUDA graphs, and the same bits again.

The tests named "cuda" need an NVIDIA GPU (`pytest -m gpu tests/test_kernels_use.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ilr_kernels import reference
from ilr_kernels.advantage import calibrated_advantage
from ilr_kernels.lm_head import linear_logprob, linear_policy_loss
from ilr_kernels.policy_loss import PolicyLoss
from kernels_cases import VARIANTS, Inputs, compare, make_inputs, relative_error, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
ON = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float32, id="cpu"),
        pytest.param("cuda", torch.bfloat16, marks=GPU, id="cuda-bfloat16"),
        pytest.param("cuda", torch.float32, marks=GPU, id="cuda-float32"),
    ],
)
SHAPE = (37, 64, 1003)
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def gpu(test: Any) -> Any:
    return GPU[0](GPU[1](test))


def case(
    device: str, dtype: torch.dtype, shape=SHAPE, seed: int = 0, name: str = "ppo"
) -> tuple[Tensor, Tensor, Inputs]:
    """Hidden states and a head that want gradients, and the other arguments of `linear_policy_loss`."""
    inputs = make_inputs(shape, VARIANTS[name], dtype, device, seed)
    hidden, weight = (inputs.leaves[k].requires_grad_() for k in ("hidden_TD", "weight_VD"))
    return hidden, weight, inputs


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.isfinite().all()
    assert relative_error(found, expected.double()) < CLOSE[dtype]


@ON
def test_backward_twice(device, dtype):
    hidden, weight, inputs = case(device, dtype)
    logp = linear_logprob(hidden, weight, inputs.fixed["target_T"])
    first = torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and first[0].any()
    value, _ = linear_policy_loss(hidden, weight, **inputs.fixed)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        value.backward()
    if dtype == torch.bfloat16:
        kept = linear_logprob(hidden, weight, inputs.fixed["target_T"], keep_softmax=True).sum()
        torch.autograd.grad(kept, (hidden, weight), retain_graph=True)
        with pytest.raises(RuntimeError, match="keep_softmax"):
            kept.backward()


@ON
def test_accumulation_into_grad_and_into_a_buffer(device, dtype):
    """Two micro-batches, into a gradient that is there and into a float32 buffer, add up to the sum of both."""
    hidden, weight, inputs = case(device, dtype)
    other_hidden, _, others = case(device, dtype, seed=1)
    parts = [
        torch.autograd.grad(linear_policy_loss(h, weight, **i.fixed)[0], weight)[0].double()
        for h, i in ((hidden, inputs), (other_hidden, others))
    ]
    weight.grad = torch.full_like(weight, 0.25)
    buffer = torch.full_like(weight, 0.25, dtype=torch.float32)
    for h, i in ((hidden, inputs), (other_hidden, others)):
        linear_policy_loss(h, weight, **i.fixed)[0].backward()
        linear_policy_loss(h, weight, **i.fixed, weight_grad_VD=buffer)
    expected = 0.25 + sum(parts)
    assert_near(weight.grad, expected, dtype)
    assert_near(buffer, expected, dtype)
    assert_near(buffer - 0.25, sum(parts), dtype)


@ON
@pytest.mark.parametrize("upstream", [-0.5, 0.0, 3.0])
def test_upstream_gradient(device, dtype, upstream):
    hidden, weight, inputs = case(device, dtype, name="everything by token")
    leaves = (hidden, weight, inputs.leaves["bias_V"].requires_grad_())
    fixed = inputs.fixed | {"bias_V": leaves[2]}
    whole = torch.autograd.grad(linear_policy_loss(hidden, weight, **fixed)[0], leaves)
    value, _ = linear_policy_loss(hidden, weight, **fixed)
    scaled = torch.autograd.grad(upstream * value, leaves)
    for found, expected in zip(scaled, whole, strict=True):
        assert expected.any()
        assert_near(found, upstream * expected, dtype)


@ON
def test_a_tied_weight_adds_up(device, dtype):
    """Embedding and head are one parameter: both gradients reach it."""
    _, weight, inputs = case(device, dtype)
    tokens = torch.arange(SHAPE[0], device=device) * 7

    def results(policy_loss: Any, logprob: Any, to: torch.dtype) -> dict[str, Tensor]:
        tied = weight.detach().to(to).requires_grad_()
        value, _ = policy_loss(torch.nn.functional.embedding(tokens, tied) * 2, tied, **inputs.fixed)
        logp = logprob(tied[: SHAPE[0]] * 0.5, tied, inputs.fixed["target_T"])
        (value + logp.sum() / 64).backward()
        return {"dtied": tied.grad}

    truth, plain = (
        results(reference.linear_policy_loss, reference.linear_logprob, to) for to in (torch.float64, dtype)
    )
    compare(truth, plain, results(linear_policy_loss, linear_logprob, dtype), dtype, "tied")


@ON
def test_checkpoint(device, dtype):
    """Recomputed in the backward pass, with a layer before it: the same bits as without."""
    hidden, weight, inputs = case(device, dtype)
    layer = torch.eye(SHAPE[1], device=device, dtype=dtype).requires_grad_()

    def head(h: Tensor, w: Tensor) -> Tensor:
        return linear_logprob(h @ layer, w, inputs.fixed["target_T"], temperature=0.8)

    expected = torch.autograd.grad(head(hidden, weight).sum(), (hidden, weight, layer))
    for reentrant in (False, True):
        logp = checkpoint(head, hidden, weight, use_reentrant=reentrant)
        for x in (hidden, weight, layer):
            x.grad = None
        logp.sum().backward()
        assert all(torch.equal(x.grad, y) for x, y in zip((hidden, weight, layer), expected, strict=True))


@ON
def test_compile(device, dtype):
    """A compiled function runs the kernels outside of its graphs: the same results."""
    hidden, weight, inputs = case(device, dtype)
    advantages = torch.rand(2, 5, 8, device=device)

    def step(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = h * 2
        value, stats = linear_policy_loss(h, w, **inputs.fixed)
        logp = linear_logprob(h, w, inputs.fixed["target_T"])
        return value + logp.sum() * 0.125, stats["logp_T"], calibrated_advantage(advantages)[1] * 2

    def results(function: Any) -> list[Tensor]:
        value, logp, advantage = function(hidden, weight)
        return [value.detach(), logp.nan_to_num(7.0), advantage, *torch.autograd.grad(value, (hidden, weight))]

    expected = results(step)
    for backend in ("inductor",) if device == "cuda" else ("eager", "aot_eager"):
        torch.compiler.reset()
        for found, exact in zip(results(torch.compile(step, backend=backend)), expected, strict=True):
            assert_near(found, exact, dtype)


@ON
@pytest.mark.parametrize("name", ["ppo off-policy", "everything", "everything by token"])
def test_the_same_inputs_give_the_same_bits(device, dtype, name):
    inputs = make_inputs((300, 64, 1003), VARIANTS[name], dtype, device)
    first, again = (run(linear_policy_loss, inputs, dtype, 0.5, chunk=128) for _ in range(2))
    for key, x in first.items():
        assert torch.equal(x.nan_to_num(7.0), again[key].nan_to_num(7.0)), key


def replay_and_compare(dtype: torch.dtype, name: str) -> None:
    """A captured step, forward and backward, on inputs that it was not captured with, against the step itself."""
    hidden, weight, inputs = case("cuda", dtype, (300, 64, 5003), name=name)
    new_hidden, new_weight, news = case("cuda", dtype, (300, 64, 5003), seed=1, name=name)
    fixed = {k: x.clone() if isinstance(x, Tensor) else x for k, x in inputs.fixed.items()}
    buffer = torch.zeros_like(weight, dtype=torch.float32)

    def step(h: Tensor, w: Tensor, given: dict[str, Any], into: Tensor) -> tuple[Tensor, Tensor]:
        value, stats = linear_policy_loss(h, w, **given, weight_grad_VD=into, chunk=128)
        value.backward()
        return value.detach(), stats["logp_T"]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and lets cuBLAS take its workspace
            step(hidden, weight, fixed, buffer)
    torch.cuda.current_stream().wait_stream(side)
    hidden.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, logp = step(hidden, weight, fixed, buffer)

    with torch.no_grad():
        hidden.copy_(new_hidden)
        weight.copy_(new_weight)
        for k, x in fixed.items():
            if isinstance(x, Tensor):
                x.copy_(news.fixed[k])
        buffer.zero_()
    graph.replay()
    expected_buffer = torch.zeros_like(buffer)
    expected_value, expected_logp = step(new_hidden, new_weight, news.fixed, expected_buffer)
    computed = ~expected_logp.isnan()
    assert computed.any() and expected_buffer.any()
    assert_near(value, expected_value, dtype)
    assert_near(logp[computed], expected_logp[computed], dtype)
    assert_near(buffer, expected_buffer, dtype)
    assert_near(hidden.grad, new_hidden.grad, dtype)
    kept = [x.clone() for x in (value, logp, hidden.grad)]
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(kept, (value, logp, hidden.grad), strict=True))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["ppo off-policy", "everything by token"])
def test_cuda_graph(dtype, name):
    replay_and_compare(dtype, name)


@gpu
def test_cuda_graph_of_the_advantage():
    rewards, mask = torch.rand(3, 50, 8, device="cuda"), torch.rand(3, 50, 8, device="cuda") < 0.8
    calibrated_advantage(rewards, mask)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calibrated, advantage = calibrated_advantage(rewards, mask)
    rewards.copy_(torch.rand(3, 50, 8))
    graph.replay()
    expected = calibrated_advantage(rewards, mask)
    assert torch.equal(calibrated, expected[0]) and torch.equal(advantage, expected[1]) and advantage.any()


@gpu
def test_advantage_of_other_layouts():
    """A compiled kernel that is kept serves any address, stride and number of questions, on any loss's options."""
    wide = torch.rand(3, 41, 17, device="cuda")
    mask = torch.rand(3, 41, 17, device="cuda") < 0.8
    for rewards, there in (
        (wide[:, :, :8], mask[:, :, :8]),
        (wide[:, 1:, 1:9].contiguous(), mask[:, 1:, 1:9].contiguous()),
        (wide.flatten()[3 : 3 + 3 * 7 * 8].view(3, 7, 8), mask.flatten()[5 : 5 + 3 * 7 * 8].view(3, 7, 8)),
        (wide[:, :1, :8], None),
    ):
        for weight, eps in ((0.5, 1e-4), (2.0, 0.1)):
            options = {"calibrate": "advantage", "calibrate_weight": weight, "eps": eps}
            truth = reference.calibrated_advantage(rewards.double(), there, **options)
            for x, exact in zip(calibrated_advantage(rewards, there, **options), truth, strict=True):
                assert relative_error(x, exact) < 5e-6


@gpu
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(700, 896, 50264), (300, 4096, 32000)], ids=str)
def test_batch_invariance(shape, temperature):
    """In bfloat16 a row's log-prob and entropy have the same bits alone, in any batch and at any position.

    From one row to 131,072, with and without the entropy and the gradients.
    """
    inputs = make_inputs(shape, VARIANTS["ppo"], torch.bfloat16, "cuda")
    hidden, weight = inputs.leaves.values()
    target = inputs.fixed["target_T"].clamp(min=0)
    hidden[0] *= 60  # its target may be so improbable that its sum overflows: of no concern to the others

    def both(rows: Any) -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden[rows], weight, target[rows], temperature=temperature, with_entropy=True)

    logp, entropy = both(slice(None))
    g = torch.Generator("cuda").manual_seed(0)
    shuffled = torch.randperm(shape[0], generator=g, device="cuda")
    many = torch.randint(shape[0], (131072,), generator=g, device="cuda")
    for rows in (slice(5, 6), slice(130, 131), slice(3, 20), slice(100, 229), shuffled, shuffled[:129], many):
        found = both(rows)
        assert torch.equal(found[0], logp[rows]) and torch.equal(found[1], entropy[rows]), rows
    for rows in (slice(5, 6), slice(3, 20), shuffled):
        alone = linear_logprob(hidden[rows], weight, target[rows], temperature=temperature)
        assert torch.equal(alone, logp[rows]), rows
    whole = torch.ones(shape[0], device="cuda")
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    for chunk in (128, 200, None):
        options = {"temperature": temperature, "chunk": chunk, "loss": PolicyLoss()}
        for h, w in ((hidden, weight), leaves):
            _, stats = linear_policy_loss(h, w, target, whole, whole, **options)
            assert torch.equal(stats["logp_T"], logp) and torch.equal(stats["entropy_T"], entropy)
