"""`random_weights`: a folder with a config.json and a tokenizer is enough, and the seed decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from end_to_end import save_models, write_config
from learners import make_agent, rollout, save_model, weights

from ilr_fast.cli import main
from ilr_fast.config import AgentConfig
from ilr_fast.errors import UserError
from ilr_fast.loading import load_policy


@pytest.fixture
def shape(tmp_path):
    """A model's folder without its weights."""
    folder = save_model(tmp_path, "llama_tied")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


def test_the_seed_decides(shape):
    config = AgentConfig(model=str(shape), random_weights=True, device="cpu")
    one, again, other = (load_policy(config, "agents.ada", seed) for seed in (1, 1, 2))
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (one, again, other)]
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])
    assert one.lm_head.weight is one.model.embed_tokens.weight
    state = torch.random.get_rng_state()
    load_policy(config, "agents.ada", 3)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(UserError, match="no weights"):
        load_policy(replace(config, random_weights=False), "agents.ada", 1)


def test_it_learns(shape):
    trainer = make_agent(shape, random_weights=True)
    before = weights(trainer)
    assert trainer.update(rollout(), 1).skipped is None
    assert not torch.equal(weights(trainer), before)


def test_a_run(tmp_path):
    models = save_models(tmp_path / "models")
    for file in models.rglob("*.safetensors"):
        file.unlink()
    config = write_config(tmp_path, models, agents__ada__random_weights=True, agents__bob__random_weights=True,
                          steps=1, log__tensorboard=False)  # fmt: skip
    assert main(["train", str(config), "--debug"]) == 0
