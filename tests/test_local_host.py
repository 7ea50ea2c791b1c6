"""An agent and its engine in one process: what is sampled is what is trained."""

from __future__ import annotations

import asyncio
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
import transformers
from learners import save_model, words

from ilr_fast import allocator, loading
from ilr_fast.allocator import grow_segments, plain_segments
from ilr_fast.chat import ChatFormat
from ilr_fast.config import AgentConfig, Config, EngineConfig, OptimizerConfig, RolloutConfig
from ilr_fast.credit import training_sequences
from ilr_fast.errors import UserError
from ilr_fast.hosts.local import open_host
from ilr_fast.team import prepare_chat
from ilr_fast.types import Credited, Dialogue, Question, Sampling, Scored, Turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models"), "llama_tied")


@pytest.mark.parametrize("train", ["full", "lora", "none"])
def test_a_host_samples_from_what_it_trains(folder, train):
    config = AgentConfig(
        model=str(folder), device="cpu", dtype="float32", train=train, optimizer=OptimizerConfig(lr=1e-3),
        chat_template="plain",
    )  # fmt: skip
    run = Config(agents={"ada": config}, rollout=RolloutConfig(temperature=0.8), steps=4)
    host = open_host("ada", config, run, ChatFormat(words(), "plain"))
    prompt = [3, 4, 5, 6]

    def sampled(step):
        async def ask():
            wanted = [Sampling(max_tokens=6, temperature=0.8, seed=100 * step + i) for i in range(6)]
            return await asyncio.gather(*(host.generate(prompt, sampling) for sampling in wanted))

        turns = [Turn("sharing", "neutral", "", tuple(prompt), g) for g in asyncio.run(ask())]
        dialogues = [Dialogue(Question("q", "", ""), i, "single", {"ada": (t,)}) for i, t in enumerate(turns)]
        credited = [
            Credited(Scored(d, {}, {}), {}, {"ada": (1.0 if i % 2 else -1.0,)}) for i, d in enumerate(dialogues)
        ]
        return training_sequences(credited, "ada")

    assert host.trains == (train != "none")
    for step in (1, 2, 3):
        sequences = sampled(step)
        if host.trains:
            metrics = host.update(sequences, step).metrics
            assert metrics["logp_diff_max"] < 1e-4 and metrics["grad_norm"] > 0
    stats = host.stats()
    assert stats["tokens_generated"] > 0 and stats["memory_peak_gib"] > 0
    host.close()


def test_a_missing_vllm_is_said_before_anything_is_loaded(monkeypatch):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    agent = AgentConfig(model="nowhere", engine=EngineConfig(name="vllm"))
    with pytest.raises(UserError, match=r"agents\.ada\.engine\.name: vLLM is not installed[^→]*→ .*embedded"):
        prepare_chat("ada", agent)


def test_segments_grow_but_while_an_engine_is_opened(monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", told.append)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    grow_segments()
    with pytest.raises(KeyError), plain_segments():
        raise KeyError  # an engine that can't be opened
    assert told == [f"expandable_segments:{grow}" for grow in (True, False, True)]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")  # the user's own stay
    with plain_segments():
        grow_segments()
    assert len(told) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has large pages by request")
def test_large_blocks_are_asked_for_in_large_pages(monkeypatch):
    told = []
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: SimpleNamespace(madvise=lambda *asked: told.append(asked)))
    block = torch.empty(5 * 2**20, dtype=torch.uint8)
    assert allocator.in_large_pages(block) is block
    ((start, size, advice),) = told
    assert start.value % 2**21 == 0 and size.value % 2**21 == 0 and size.value >= 2**21 and advice == 14
    assert block.data_ptr() <= start.value and start.value + size.value <= block.data_ptr() + block.nbytes
    allocator.in_large_pages(torch.empty(1000))
    assert len(told) == 1


def test_weights_that_were_drawn_on_a_device_move_to_the_host_as_they_are(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "llama_tied"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    moved = loading._moved_to_host(model)
    assert moved is model and all(p is parameters[n] for n, p in moved.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in moved.state_dict().items())
