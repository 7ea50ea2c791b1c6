"""The examples run, and so does the code of docs/kernels.md; the patched TRL gives TRL's loss and gradients."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_transformers_loop_learns(example):
    loop = example("transformers_loop")
    torch.manual_seed(0)
    model = loop.make_model(None, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    rewards = [loop.step(model, optimizer)[0] for _ in range(15)]
    assert rewards[0] < 0.65 and sum(rewards[-3:]) / 3 > 0.8, rewards


def test_examples_need_the_kernels_alone():
    for file in EXAMPLES.glob("*.py"):
        assert "ilr_fast" not in file.read_text(), file


def test_code_of_the_page_runs():
    """Every fenced Python block of docs/kernels.md, in order, in one namespace, as a reader would paste them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    namespace = {}
    for block in blocks:
        if "trl" not in block:
            exec(compile(block, "docs/kernels.md", "exec"), namespace)


def test_excerpts_of_the_page_stand_in_the_examples():
    """An excerpt marked with its file is, line by line, in that file."""
    page = (ROOT / "docs" / "kernels.md").read_text()
    excerpts = re.findall(r"<!-- excerpt: (\S+) -->\n```py\n(.*?)```", page, re.DOTALL)
    assert excerpts
    for name, code in excerpts:
        lines = {line.strip() for line in (EXAMPLES / name).read_text().splitlines()}
        missing = [line for line in code.splitlines() if line.strip() and line.strip() not in lines]
        assert not missing, (name, missing)


B, C = 4, 12
CASES = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "dapo of a larger generation": {"loss_type": "dapo", "steps_per_generation": 3},
    "grpo off-policy": {"loss_type": "grpo", "off_policy": True},
    "two bounds": {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.3, "off_policy": True},
    "delta": {"loss_type": "bnpo", "delta": 1.25, "off_policy": True},
    "gspo": {"loss_type": "grpo", "epsilon": 0.02, "importance_sampling_level": "sequence", "off_policy": True},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3, "off_policy": True},
    "temperature": {"loss_type": "grpo", "temperature": 0.7},
    "grpo with KL": {"loss_type": "grpo", "beta": 0.2},
    "dapo with KL": {"loss_type": "dapo", "beta": 0.2},
    "bnpo with KL": {"loss_type": "bnpo", "beta": 0.2},
    "dr_grpo with KL": {"loss_type": "dr_grpo", "beta": 0.2},
    "KL off-policy": {"loss_type": "grpo", "beta": 0.2, "off_policy": True},
    "KL without the ratio": {"loss_type": "dapo", "beta": 0.2, "use_bias_correction_kl": False},
    "importance weights": {"loss_type": "dapo", "off_policy": True, "importance_sampling": True},
    "tools": {"loss_type": "grpo", "off_policy": True, "tools": True},
    "bfloat16": {"loss_type": "dapo", "off_policy": True, "bfloat16": True},
}
NOT_COVERED = {
    "delta within the clip": {"loss_type": "bnpo", "delta": 1.1, "off_policy": True},
    "sapo": {"loss_type": "sapo"},
    "KL off-policy without the ratio": {
        "loss_type": "grpo",
        "beta": 0.2,
        "off_policy": True,
        "use_bias_correction_kl": False,
    },
    "KL with sequence ratios": {"loss_type": "grpo", "beta": 0.2, "importance_sampling_level": "sequence"},
    "entropy bonus": {"loss_type": "grpo", "entropy_coef": 0.1},
    "high-entropy tokens": {"loss_type": "grpo", "top_entropy_quantile": 0.5},
}


def trainer_and_inputs(example, case):
    """A tiny trainer on the CPU, and inputs in which one completion is short and one has advantage 0."""
    time = example("trl_time")
    extra = ("beta", "off_policy", "importance_sampling", "tools", "bfloat16")
    settings = {name: value for name, value in case.items() if name not in extra}
    trainer = time.make_trainer("tiny", B, C, "cpu", **settings)
    trainer.current_gradient_accumulation_steps = 2
    trainer.beta = case.get("beta", 0.0)  # given to the config, it would load a reference model
    if case.get("bfloat16"):
        trainer.model.bfloat16()
    inputs = time.make_inputs(trainer, B, C)
    inputs["advantages"][1] = 0
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logp = trainer._get_per_token_logps_and_entropies(trainer.model, tokens, mask, C)[0]
    if case.get("off_policy"):
        shift = -0.3 if "delta" in case else 0.15  # delta acts where a bad token became likelier
        towards_the_clip = shift * inputs["advantages"].sign()[:, None]
        inputs["old_per_token_logps"] = logp - towards_the_clip + 0.25 * torch.randn(B, C, generator=g)
    if trainer.beta != 0:
        inputs["ref_per_token_logps"] = logp + 0.5 * torch.randn(B, C, generator=g)
    if case.get("importance_sampling"):
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        inputs["importance_sampling_ratio"] = 2 * torch.rand(B, C, generator=g)
    if case.get("tools"):
        inputs["tool_mask"] = torch.randint(2, (B, C), generator=g)
    return trainer, inputs


def results(trainer, inputs):
    trainer.model.zero_grad(set_to_none=True)
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, inputs)
    (3 * loss).backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    return loss.detach(), grads, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.fixture
def trl(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    return pytest.importorskip("trl")


@pytest.mark.parametrize("name", [*CASES, *NOT_COVERED])
def test_the_patched_trl_gives_its_own_loss_gradients_and_metrics(example, trl, name):
    patch = example("trl_patch").patch
    covered = name in CASES
    trainer, inputs = trainer_and_inputs(example, (CASES if covered else NOT_COVERED)[name])
    loss, grads, metrics = results(trainer, inputs)
    assert loss.abs() > 1e-4 or "off" not in name
    undo = patch(trl.GRPOTrainer, strict=covered)
    try:
        if covered:
            our_loss, our_grads, our_metrics = results(trainer, inputs)
        else:
            with pytest.warns(UserWarning, match="does not cover"):
                our_loss, our_grads, our_metrics = results(trainer, inputs)
    finally:
        undo()
    tolerance = 2e-2 if "bfloat16" in name else 2e-5
    torch.testing.assert_close(our_loss, loss, rtol=tolerance, atol=tolerance)
    assert sum(float(g.abs().sum()) for g in grads.values()) > 0
    for parameter, grad in grads.items():
        error = (our_grads[parameter] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error < tolerance, (parameter, float(error))
    assert our_metrics.keys() == metrics.keys()
    for metric, value in metrics.items():
        assert our_metrics[metric] == pytest.approx(value, rel=10 * tolerance, abs=tolerance), metric


def test_the_variants_that_are_timed_agree(example, trl):
    time = example("trl_time")
    trainer = time.make_trainer("tiny", B, C, "cpu", loss_type="bnpo")
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs, losses = time.make_inputs(trainer, B, C), []
    for name in ("trl", "head", "patched"):
        with time.variant(name, trainer) as step:
            losses.append(float(step(inputs)))
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


@pytest.mark.parametrize("name", NOT_COVERED)
def test_strictly_patched_trl_refuses_what_is_not_covered(example, trl, name):
    trainer, inputs = trainer_and_inputs(example, NOT_COVERED[name])
    undo = example("trl_patch").patch(trl.GRPOTrainer, strict=True)
    try:
        with pytest.raises(ValueError, match="does not cover"):
            trainer.compute_loss(trainer.model, inputs)
    finally:
        undo()


def test_patching_twice_is_refused_and_undone(example, trl):
    patch, original = example("trl_patch").patch, trl.GRPOTrainer._compute_loss
    undo = patch(trl.GRPOTrainer)
    with pytest.raises(RuntimeError, match="already"):
        patch(trl.GRPOTrainer)
    undo()
    assert trl.GRPOTrainer._compute_loss is original and "trl" in sys.modules
