"""Adapters become full models that load without peft and say the same."""

from __future__ import annotations

import pytest
import torch
from end_to_end import agent, save_models, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from ilr_fast.cli import main


def test_merged_adapters_load_as_a_model_and_give_the_adapters_logits(tmp_path):
    peft = pytest.importorskip("peft")
    models = tmp_path / "models"
    save_models(models)
    agents = {"ada": agent(models, train="lora", optimizer={"lr": 1e-2}), "bob": agent(models, "bob", train="none")}
    config = write_config(tmp_path, models, agents=agents, steps=2, interaction="none")
    for _ in range(2):  # the second time replaces what is there
        assert main(["train", str(config), "--merge", "--debug"]) == 0
    run = tmp_path / "run"
    assert [p.name for p in (run / "merged").iterdir()] == ["ada"]
    assert not (run / "merged" / "ada" / "adapter_config.json").exists()
    AutoTokenizer.from_pretrained(run / "merged" / "ada")
    merged = AutoModelForCausalLM.from_pretrained(run / "merged" / "ada")
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(run / "checkpoints" / "best" / "ada")
    base = AutoModelForCausalLM.from_pretrained(models / "ada")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        of_merged, of_adapted, of_base = (model(ids).logits for model in (merged, adapted, base))
    torch.testing.assert_close(of_merged, of_adapted, atol=1e-5, rtol=1e-4)
    assert not torch.equal(of_merged, of_base)


def test_nothing_to_merge_is_said_before_training(tmp_path, capsys):
    save_models(tmp_path / "models")
    assert main(["train", str(write_config(tmp_path, tmp_path / "models")), "--merge"]) == 2
    assert "no agent has adapters" in capsys.readouterr().err and not (tmp_path / "run").exists()
