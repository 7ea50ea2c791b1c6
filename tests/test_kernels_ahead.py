"""Kernels compiled ahead: the update that compiles them, when its process is started, and that no run hangs on it."""

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learners import FAMILIES, save_model

from ilr_fast import kernels_ahead
from ilr_fast.config import AgentConfig, Config, DataConfig, LossConfig
from ilr_fast.config_parse import dump
from ilr_fast.kernels_ahead import GIB, Ahead, small_model, small_update


def config_of(model, loss=None, **keys):
    agent = AgentConfig(**{"model": str(model), "device": "cpu", "dtype": "float32", **keys})
    return Config(agents={"ada": agent}, loss=loss or LossConfig())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_the_small_update(tmp_path, family):
    config = config_of(save_model(tmp_path, family))
    result = small_update("ada", config.agents["ada"], config)
    assert result.skipped is None and result.tokens_dropped == 0
    assert math.isfinite(result.metrics["grad_norm"]) and result.metrics["grad_norm"] > 0


def test_the_runs_own_settings_count(tmp_path):
    model = save_model(tmp_path, "llama")
    config = config_of(model, LossConfig(beta=0.1, minibatches=3, importance="sequence"), train="lora")
    result = small_update("ada", config.agents["ada"], config)
    assert result.metrics["kl_reference"] is not None and result.skipped is None
    full = config_of(model, LossConfig(beta=0.1))
    assert small_update("ada", full.agents["ada"], full).metrics["kl_reference"] == 0


def test_the_model_is_small_but_as_wide(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_ahead, "VOCABULARY", 64)
    model = small_model(config_of(save_model(tmp_path, "gemma3")).agents["ada"], "agents.ada")
    assert len(model.model.layers) == 1 and model.config.hidden_size == 32
    assert len(model.get_input_embeddings().weight) == 64 + 97 % 64  # odd stays odd, a multiple of 16 one


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    """A run that seems to have a GPU; the processes that it starts."""
    started = []

    def start(folder):
        started.append(folder)
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    config = config_of(tmp_path / "model")
    monkeypatch.setattr(kernels_ahead, "learners_on_gpu", lambda config: config.agents)
    monkeypatch.setattr(kernels_ahead, "_mark", lambda config: tmp_path / "mark")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(kernels_ahead, "start", start)
    return config, started


def test_a_process_is_started_once_and_ended_with_the_run(on_gpu, tmp_path):
    config, started = on_gpu
    with kernels_ahead.kernels_ahead(config, tmp_path, room=math.inf) as ahead:
        process = ahead._process
        assert started == [tmp_path]
        assert process.poll() is None
    assert process.poll() is not None
    (tmp_path / "mark").touch()
    with kernels_ahead.kernels_ahead(config, tmp_path, room=math.inf):
        assert len(started) == 1


def test_none_is_started_without_room(on_gpu, tmp_path):
    config, started = on_gpu
    with kernels_ahead.kernels_ahead(config, tmp_path, room=1.9 * GIB) as ahead:
        ahead.wait()
    assert not started


def test_deterministic_runs_and_runs_without_a_gpu_have_none(tmp_path, monkeypatch):
    config = config_of(tmp_path / "model", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not kernels_ahead.learners_on_gpu(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(kernels_ahead, "find_spec", lambda name: name)
    assert list(kernels_ahead.learners_on_gpu(config)) == ["ada"]
    assert not kernels_ahead.learners_on_gpu(replace(config, deterministic=True))


def test_a_process_that_fails_or_hangs_ends_no_run(monkeypatch):
    monkeypatch.setattr(kernels_ahead, "LONGEST_WAIT", 0.2)
    for code in ("raise SystemExit(3)", "import time; time.sleep(60)"):
        ahead = Ahead(subprocess.Popen([sys.executable, "-c", code]))
        ahead.wait()
        ahead.close()
        assert ahead._process.wait(5) != 0


def test_the_command_reads_the_runs_config(tmp_path, monkeypatch):
    data = DataConfig(train="task:sums", validation="task:sums", test="task:sums", train_size=8)
    config = replace(config_of(save_model(tmp_path, "llama")), data=data, protocol="single", interaction="none")
    (tmp_path / "config.yaml").write_text(dump(config))
    monkeypatch.setattr(kernels_ahead, "_mark", lambda config: tmp_path / "cache" / "mark")
    taken = []
    monkeypatch.setattr(kernels_ahead, "learners_on_gpu", lambda config: config.agents)
    monkeypatch.setattr(kernels_ahead, "small_update", lambda name, agent, config: taken.append((name, agent.model)))
    kernels_ahead.main([str(tmp_path / "config.yaml")])
    assert taken == [("ada", config.agents["ada"].model)] and (tmp_path / "cache" / "mark").exists()


def test_it_ends_with_the_command(tmp_path):
    script = f"""
import pathlib, time
from ilr_fast import kernels_ahead
print(kernels_ahead.start(pathlib.Path({str(tmp_path)!r})).pid, flush=True)
time.sleep(0.5)
"""
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "config.yaml")  # it waits here, however long it takes
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60)
    end = time.monotonic() + 30
    while Path("/proc", done.stdout.strip()).exists():
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.05)
