"""A supervised start: what is learned, and that it is."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from end_to_end import save_models, write_config

from ilr_fast.config_parse import load_config
from ilr_fast.session import prepare
from ilr_fast.warm_start import demonstrations, main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def config_with(models, tmp_path, solution):
    file = write_config(tmp_path, models)
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1), "solution": solution(n)} for n in range(8)]
    train = tmp_path / "worked.jsonl"
    train.write_text("".join(json.dumps({k: v for k, v in row.items() if v}) + "\n" for row in rows))
    return file, f"data.train={train}"


def test_the_answers_become_likelier_and_the_models_load(models, tmp_path):
    file, train = config_with(models, tmp_path, lambda n: f"{n} + 1" if n else None)
    assert main([str(file), str(tmp_path / "start"), train, "--passes", "8", "--batch", "4",
                 "agents.ada.optimizer.lr=3e-3", "agents.bob.optimizer.lr=3e-3"]) == 0  # fmt: skip
    ready = prepare(load_config(file, [train]))
    for name, agent in ready.config.agents.items():
        shown = demonstrations(ready, ready.chats[name], [q for q in ready.splits["train"] if q.solution])
        assert len(shown) == 7
        before, after = (mean_logp(folder, shown) for folder in (agent.model, tmp_path / "start" / name))
        assert after > before + 0.5
        last = ready.chats[name].tokenizer.decode([shown[0].tokens[-1]])
        assert last.strip() in ("", "<|im_end|>"), "the end of the turn is learned too"


def test_only_the_texts_are_learned_whatever_the_loss_of_the_run(models, tmp_path):
    file, train = config_with(models, tmp_path, lambda n: f"{n} + 1")
    kinds = {"plain": [], "other": ["loss.importance=token", "loss.minibatches=2", "loss.old_logps=engine"]}
    for kind, keys in kinds.items():
        assert main([str(file), str(tmp_path / kind), train, *keys, "agents.bob.train=none"]) == 0
    plain, other = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind / "ada") for kind in kinds)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("given", [("--batch", "0"), ("--passes", "-1"), ("--examples", "few")])
def test_numbers_are_looked_at_before_anything_is_loaded(given, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["none.yaml", "start", *given])
    assert ended.value.code == 2 and "at least 1" in capsys.readouterr().err


def test_no_written_solution_is_said(models, tmp_path, capsys):
    file, train = config_with(models, tmp_path, lambda n: None)
    assert main([str(file), str(tmp_path / "start"), train]) == 2
    assert "no training question has a written solution" in capsys.readouterr().err


def test_a_model_is_not_written_over(models, tmp_path, capsys):
    file, train = config_with(models, tmp_path, lambda n: f"{n} + 1")
    there = tmp_path / "start" / "bob" / "model.safetensors"
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    (tmp_path / "start" / "ada").mkdir()
    assert main([str(file), str(tmp_path / "start"), train]) == 2
    assert f"start{os.sep}bob" in capsys.readouterr().err
    assert there.read_text() == "mine" and not list((tmp_path / "start" / "ada").iterdir())


def mean_logp(folder, sequences):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    values = []
    for one in sequences:
        (turn,) = one.turns
        tokens = torch.tensor([one.tokens])
        logps = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        values.append(float(logps[turn.start - 1 : turn.end - 1].mean().detach()))
    return sum(values) / len(values)
