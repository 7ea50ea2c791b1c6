"""Triton's kernels of an update are compiled in a process beside, while models are read and engines start.

Triton compiles a kernel when it is launched first and keeps it on the disk. The first step of the first run on a
machine waited for twenty of them. Here a process takes an update of each agent's model with one layer, a small
vocabulary and random weights, under the run's own settings; what it compiled the run finds on the disk.

    with kernels_ahead(config, folder.path, room=room) as ahead:
        ...                       # models are loaded
        ahead.wait()              # before the first step

Nothing depends on it: where the process fails, the first step compiles what is missing. It leaves a mark in Triton's
cache, and is not started again for what it has compiled there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ilr_kernels import policy_loss
from transformers import AutoConfig, AutoModelForCausalLM

from ilr_fast.agent import Agent
from ilr_fast.attention import prepare
from ilr_fast.config import AgentConfig, Config
from ilr_fast.config_parse import load_config
from ilr_fast.loading import device_of, dtype_of, for_training
from ilr_fast.models import resolve_model
from ilr_fast.parent import die_with
from ilr_fast.types import StepResult, TrainingSequence, TrainingTurn

VOCABULARY = 1 << 15  # tokens at most: kernels depend on their number's divisors alone
GIB = 1 << 30
LONGEST_WAIT = 120.0  # seconds
PROMPT, TURN, SAMPLES = 13, 10, 4  # tokens, and samples of a question: no number that kernels are made specially for


class Ahead:
    """The process that compiles, or none."""

    def __init__(self, process: subprocess.Popen[bytes] | None = None):
        self._process = process

    def wait(self) -> None:
        """Until it has ended, for two minutes at most: two that compile the same take longer than one."""
        if self._process is not None:
            try:
                self._process.wait(LONGEST_WAIT)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def close(self) -> None:
        """Ends it, wherever it is."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextmanager
def kernels_ahead(config: Config, folder: Path, *, room: float) -> Iterator[Ahead]:
    """Begins to compile for the run in `folder` (its config.yaml), where that is new here and `room`, bytes of a GPU
    that the run's plan leaves, holds what it takes: 2 GiB, for a context and one layer of each model."""
    mark = _mark(config) if room >= 2 * GIB and learners_on_gpu(config) else None
    process = None
    if mark is not None and not mark.exists():
        for name, agent in learners_on_gpu(config).items():
            if agent.host == "local":  # this process is the first on the GPU, should only one be allowed
                torch.cuda.mem_get_info(device_of(agent, f"agents.{name}"))
        process = start(folder)
    ahead = Ahead(process)
    try:
        yield ahead
    finally:
        ahead.close()


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The process for the run in `folder`, which writes logs/kernels.log there."""
    (folder / "logs").mkdir(exist_ok=True)
    with open(folder / "logs" / "kernels.log", "wb") as log:
        command = [sys.executable, "-m", "ilr_fast.kernels_ahead", str(os.getpid()), str(folder / "config.yaml")]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def learners_on_gpu(config: Config) -> dict[str, AgentConfig]:
    """The agents that are trained on a GPU, where Triton is; none where bits must not depend on what else runs."""
    if config.deterministic or not torch.cuda.is_available() or find_spec("triton") is None:
        return {}
    learners = {name: agent for name, agent in config.agents.items() if agent.train != "none"}
    return {n: agent for n, agent in learners.items() if device_of(agent, f"agents.{n}").type == "cuda"}


def compile_for(config: Config) -> None:
    """One update of every learner's small model."""
    for name, agent in learners_on_gpu(config).items():
        small_update(name, agent, config)


def small_update(name: str, agent: AgentConfig, config: Config) -> StepResult:
    """An update of a model with one layer and random weights, else like the agent's, on questions of noise."""
    model = for_training(small_model(agent, f"agents.{name}"), agent, f"agents.{name}", seed=0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    questions = max(2, config.loss.minibatches)
    trainer = _Small(name, agent, config, tokenizer=object(), model=model)
    if trainer.graphs is not None:  # their sizes are numbers that kernels are made specially for
        trainer.update(noise(questions, vocabulary), step=1)
        trainer.graphs = None
    return trainer.update(noise(questions, vocabulary), step=1)


def small_model(agent: AgentConfig, where: str) -> Any:
    """The agent's architecture with its widths, one layer, at most VOCABULARY tokens, on its device."""
    device = device_of(agent, where)
    shape = AutoConfig.from_pretrained(resolve_model(agent.model, f"{where}.model", weights=False))
    text = shape.get_text_config()
    if text.vocab_size > VOCABULARY:
        text.vocab_size = VOCABULARY + text.vocab_size % 64
    text.pad_token_id = None
    text.num_hidden_layers = 1
    for name in ("layer_types", "no_rope_layers"):
        if getattr(text, name, None):
            setattr(text, name, getattr(text, name)[:1])
    with device:
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype_of(agent, device))
    prepare(model)
    return model


def noise(questions: int, vocabulary: int) -> list[TrainingSequence]:
    """Groups of SAMPLES dialogues of one turn, of random tokens and advantages."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for question in range(questions):
        prompt = torch.randint(vocabulary, (PROMPT,), generator=generator).tolist()
        for sample in range(SAMPLES):
            said = torch.randint(vocabulary, (TURN + sample,), generator=generator).tolist()
            turn = TrainingTurn(PROMPT, PROMPT + len(said), 1.0 if sample % 2 else -1.0, (-10.0,) * len(said))
            found.append(TrainingSequence(str(question), sample, (*prompt, *said), (turn,)))
    return found


class _Small(Agent):
    """Its reference is a copy of the small model."""

    def _reference(self, where: str) -> Any:
        if not self.trains or self.loss.beta == 0:
            return None
        return self.model if self.config.train == "lora" else copy.deepcopy(self.model).requires_grad_(False)


def _mark(config: Config) -> Path:
    """A file whose name stands for all that the kernels depend on."""
    from triton import knobs

    parts: list[Any] = [asdict(config.loss), [metadata.version(name) for name in ("torch", "triton", "transformers")]]
    for name, agent in learners_on_gpu(config).items():
        model = resolve_model(agent.model, f"agents.{name}.model", weights=False)
        device = device_of(agent, f"agents.{name}")
        parts += [(model / "config.json").read_text(), torch.cuda.get_device_name(device), asdict(agent.optimizer),
                  asdict(agent.lora), agent.train, agent.dtype, agent.fused_layers, agent.quantize, agent.logits_mib,
                  agent.gradient_checkpointing, agent.graph_tokens]  # fmt: skip
    kernels = sorted(Path(policy_loss.__file__).parent.glob("*.py"))
    told = hashlib.sha256(json.dumps(parts).encode() + b"".join(file.read_bytes() for file in kernels)).hexdigest()
    return Path(knobs.cache.dir) / f"ilr_fast_{told[:32]}"


def main(arguments: Sequence[str]) -> None:
    """Compiles for the run whose config.yaml is named, and leaves the mark."""
    config = load_config(arguments[0])
    compile_for(config)
    mark = _mark(config)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    main(sys.argv[2:])
