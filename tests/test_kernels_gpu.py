"""The kernels on an NVIDIA GPU, at the sizes of real models: fused against float64 truth, gradients included.

pytest -m gpu tests/test_kernels_gpu.py
"""

from __future__ import annotations

import pytest
import torch
from ilr_kernels.advantage import calibrated_advantage
from ilr_kernels.lm_head import linear_policy_loss
from kernels_cases import (
    SHAPES,
    VARIANTS,
    Variant,
    check_advantage,
    check_logits,
    check_logprob,
    check_overflow,
    check_policy_loss,
    check_with_logp,
    check_within_dweight,
    make_inputs,
    run,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

# rows, hidden size, vocabulary of Qwen2.5-0.5B, Llama-3-8B, Gemma-3-270M, SmolLM2-135M; rows off every block
REAL = [(1029, 896, 151936), (515, 4096, 128256), (300, 640, 262144), (2049, 576, 49152)]


@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_shapes_against_truth(shape):
    for name in ("ppo off-policy", "everything by token", "everything"):
        check_policy_loss(shape, name, torch.bfloat16, "cuda", chunk=256)
    check_policy_loss(shape, "ppo", torch.float32, "cuda", chunk=None)
    check_logprob(shape, torch.bfloat16, "cuda")
    check_logprob(shape, torch.bfloat16, "cuda", keep_softmax=True)
    check_overflow(shape, "cuda")
    check_with_logp(shape, torch.bfloat16, "cuda")
    check_logits((shape[0], shape[2]), torch.bfloat16, "cuda", softcap=20.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_against_truth(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_policy_loss((70, 64, 5003), name, dtype, "cuda", chunk=32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes_against_truth(shape):
    for name in ("ppo off-policy", "everything", "everything by token"):
        check_policy_loss(shape, name, torch.float32, "cuda")
    check_logprob(shape, torch.float32, "cuda", softcap=4.0, temperature=0.8)


def test_exponentials_within_dweight():
    check_within_dweight((1500, 512, 5003), "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_grad_buffer(dtype):
    """dweight goes into a float32 buffer while the head is 16 bits wide; a scaled loss then gives NaN, not nonsense."""
    inputs = make_inputs((300, 64, 5003), Variant(), dtype, "cuda")
    whole = run(linear_policy_loss, inputs, dtype, 1.0)
    hidden = inputs.leaves["hidden_TD"].clone().requires_grad_()
    buffer = torch.ones(5003, 64, device="cuda")
    value, _ = linear_policy_loss(hidden, inputs.leaves["weight_VD"], **inputs.fixed, weight_grad_VD=buffer, chunk=128)
    torch.testing.assert_close((buffer - 1).to(dtype), whole["dweight_VD"], atol=1e-4, rtol=1e-2)
    value.backward()
    torch.testing.assert_close(hidden.grad, whole["dhidden_TD"])
    value, _ = linear_policy_loss(hidden, inputs.leaves["weight_VD"], **inputs.fixed, weight_grad_VD=buffer)
    (scaled,) = torch.autograd.grad(2 * value, hidden)
    assert scaled.isnan().all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 512, 8), (3, 33, 17), (8, 5, 64), (2, 3, 5000)], ids=str)
def test_advantage_against_truth(shape):
    for calibrate in ("reward", "advantage", "none"):
        for normalize in ("grpo", "dr_grpo", "rloo"):
            check_advantage(shape, calibrate, normalize, masked=shape[1] > 2, device="cuda")


def test_advantage_is_one_launch():
    rewards = torch.rand(3, 64, 8, device="cuda")
    mask = torch.rand(3, 64, 8, device="cuda") < 0.9
    calibrated_advantage(rewards, mask)  # compiles
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        calibrated_advantage(rewards, mask)
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert on_gpu == ["advantage_kernel"]
