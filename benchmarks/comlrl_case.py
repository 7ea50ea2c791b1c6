"""CoMLRL's MAGRPO on two agents, in a process of its own: prints a line of JSON with the seconds of a step.

    python -m ilr_benchmarks.comlrl_case '{"shape": "HuggingFaceTB/SmolLM2-135M-Instruct", "questions": 4, …}'

A question's rollout is a tree: `branches` first turns, and as many second ones after each, so branches + branches²
turns an agent, each of the forced length; the second turn is shown the question and the peer's first. Rewards are drawn
by chance. Buffers hold a whole step, so that the agents are updated once all is generated: CoMLRL at its fastest.
"""

from __future__ import annotations

import json
import random
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
import transformers
from ilr_benchmarks.shapes import shape_config, small_config, tokenizer

from ilr_fast.card import PeakSampler

WORDS = 78  # of a question


def main(asked: dict[str, Any]) -> None:
    """A small step to warm up, then the one that is timed."""
    sys.modules.setdefault("wandb", _silent_wandb())
    from comlrl.trainers.reinforce.magrpo import MAGRPOConfig, MAGRPOTrainer

    nodes = asked["questions"] * (1 + asked["branches"])
    config = MAGRPOConfig(
        num_train_epochs=1, agent_learning_rate=1e-6, num_agents=2, num_generations=asked["branches"], num_turns=2,
        agent_devices="cuda" if torch.cuda.is_available() else "cpu", max_new_tokens=asked["forced"],
        temperature=1.0, top_p=1.0, top_k=0, early_termination_threshold=None, eval_interval=0,
        external_prompt_passthrough=True, rollout_buffer_size=nodes, train_batch_size=nodes,
    )  # fmt: skip
    words = tokenizer(_config(asked).vocab_size)
    words.pad_token = words.eos_token
    draw = random.Random("train")
    with PeakSampler() as sampler:
        trainer = MAGRPOTrainer(
            agents=[_model(asked, seed) for seed in (0, 1)], num_agents=2, tokenizer=[words, words], args=config,
            train_dataset=None, reward_func=lambda *completions: [draw.random() for _ in completions[0]],
            formatters=[lambda item, external_prompts=None: item["prompt"]] * 2, external_transition=_next_prompts,
        )  # fmt: skip
        trainer.verbose = False
        questions = [
            {"prompt": " ".join(f"w{draw.randrange(5, 900)}" for _ in range(WORDS))} for _ in range(asked["questions"])
        ]
        config.max_new_tokens, trainer.train_dataset = 2, questions[:1]
        trainer.train(min_new_tokens=2)
        config.max_new_tokens, trainer.train_dataset = asked["forced"], questions
        parts = {"generate": 0.0, "update": 0.0}
        _clock(trainer, "_generate_completions", "generate", parts)
        _clock(trainer, "_update_from_samples", "update", parts)
        sampler.take()
        start = _now()
        trainer.train(min_new_tokens=asked["forced"])
        seconds = _now() - start
        peak = sampler.take()
    told = {"seconds": seconds, **parts, "memory_gib": None if peak is None else peak / 2**30,
            "turns": 2 * nodes * asked["branches"]}  # fmt: skip
    print(json.dumps(told), flush=True)


def _config(asked: dict[str, Any]) -> Any:
    return (small_config if asked["quick"] else shape_config)(asked["shape"])


def _model(asked: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        dtype = torch.bfloat16 if cuda else torch.float32
        return transformers.AutoModelForCausalLM.from_config(_config(asked), dtype=dtype)


def _next_prompts(*, prompt: str, agent_completions: list[str], **_: Any) -> list[str]:
    """Each agent is shown the question and what its peer said."""
    return [f"{prompt} {agent_completions[1 - agent]}" for agent in (0, 1)]


def _clock(trainer: Any, name: str, part: str, parts: dict[str, float]) -> None:
    """Adds up what a method takes."""
    work = getattr(trainer, name)

    def timed(*arguments: Any, **more: Any) -> Any:
        start = _now()
        try:
            return work(*arguments, **more)
        finally:
            parts[part] += _now() - start

    setattr(trainer, name, timed)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _silent_wandb() -> Any:
    """CoMLRL imports wandb and logs to it only where it is told to."""
    stub: Any = types.ModuleType("wandb")
    stub.run = None
    return stub


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    main(json.loads(sys.argv[1]))
