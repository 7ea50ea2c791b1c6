"""One run of `bench step`, in a process of its own: `ilr_fast.train.train` itself, on models of true shape with random
weights. Prints a line of JSON for each step, and one at the end.

    python -m ilr_benchmarks.step_case '{"agents": {"ada": "Qwen/Qwen2.5-1.5B-Instruct"}, "kinds": ["forced"], …}'

Three things are put in the loop's way, none of which changes what it does: a turn samples as many tokens as its kind of
step says ("forced": 512, "ragged": log-normal, from the request's seed), rewards are drawn by chance, and the clock is
read around each agent's update. After the last step the same turns are generated once more by each agent alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from ilr_benchmarks.shapes import SHAPES, small_shape, write_shape
from ilr_benchmarks.train_step import peak_of_products, work

from ilr_fast import agent as agent_module
from ilr_fast import train as training
from ilr_fast.config_parse import load_config
from ilr_fast.credit import training_sequences
from ilr_fast.hosts.local import LocalHost
from ilr_fast.metrics import read_metrics
from ilr_fast.types import Dialogue, Generation, Grade, Question, Sampling

TEMPLATE = (
    "{%- for message in messages -%}{{ ('w4 ' if message.role == 'assistant' else 'w3 ') + message.content + '<end>' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'w4 ' }}{%- endif -%}"
)  # for shapes.tokenizer; random weights sample <end> once in a hundred thousand tokens
TRL_LOSS = {"importance": "sequence", "importance_mode": "mask", "importance_cap": 3.0}  # its default
PROMPT = 81  # tokens before the first turn
SIGMA = 0.8  # of log-normal lengths


class Chance:
    """A grader of a user's: rewards by chance, so that every group has a gradient; the same for the same text."""

    def grade(self, question: Question, text: str) -> Grade:
        """From 0 to 1."""
        reward = random.Random(f"{question.id} {text}").random()
        return Grade(reward, reward > 0.5, True)


class Watched:
    """What is put in the loop's way (see the module), and what was seen."""

    def __init__(self, asked: Mapping[str, Any]):
        self.asked, self.step, self.kind = asked, 0, "short"
        self.train_seconds: dict[str, float] = {}
        self.packed: list[Sequence[Any]] = []  # the step's micro-batches
        self.rollouts: list[training.Rollout] = []
        self.alone: dict[str, float] = {}

    def length(self, sampling: Sampling) -> int:
        """Tokens that a request samples."""
        if self.kind == "forced":
            return self.asked["forced"]
        if self.kind == "short":
            return 4
        most = self.asked["most"]
        mean = self.asked["mean"]
        drawn = np.random.default_rng(sampling.seed).lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA)
        return int(np.clip(drawn, 1, most))

    def install(self) -> None:
        """Replaces the functions by ones that call them."""
        generate, update = LocalHost.generate, LocalHost.update
        roll_out, pack = training.roll_out, agent_module.pack_step
        watched = self

        async def generate_so_many(self: LocalHost, tokens: Sequence[int], sampling: Sampling) -> Generation:
            limit = min(sampling.max_tokens, watched.length(sampling))
            return await generate(self, tokens, replace(sampling, max_tokens=limit))

        def update_timed(self: LocalHost, *arguments: Any) -> Any:
            start = time.perf_counter()
            result = update(self, *arguments)
            watched.train_seconds[self.name] = time.perf_counter() - start
            return result

        def roll_out_kind(session: Any, interactions: Any, questions: Any, step: int, timer: Any) -> Any:
            watched.step, watched.kind = step, watched.asked["kinds"][step - 1]
            rollout = roll_out(session, interactions, questions, step, timer)
            watched.rollouts.append(rollout)
            watched.kind = "short"  # validation after the last step
            return rollout

        def pack_counted(*arguments: Any, **more: Any) -> Any:
            packed = pack(*arguments, **more)
            watched.packed.append(packed.batches)
            return packed

        def finish(steps: Any, step: int, timer: Any) -> None:
            finished(steps, step, timer)
            watched.tell(steps.row)

        finished = training._Steps.finish
        given_tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained  # the shapes' is of no model's class
        for place, name, new in (
            (transformers.AutoTokenizer, "from_pretrained", given_tokenizer),
            (LocalHost, "generate", generate_so_many), (LocalHost, "update", update_timed),
            (training, "roll_out", roll_out_kind), (agent_module, "pack_step", pack_counted),
            (training._Steps, "finish", finish), (training, "measure_after", self.generate_alone),
        ):  # fmt: skip
            setattr(place, name, new)

    def tell(self, row: Mapping[str, Any]) -> None:
        """Prints what a step took."""
        agents = {
            name: {key: agent.get(key) for key in ("grad_norm", "logp_diff_mean", "truncated_share", "skipped")}
            for name, agent in row["agents"].items()
        }
        rows = [len(batch.tokens_T) for batches in self.packed for batch in batches]
        told = {
            "step": row["step"], "kind": self.asked["kinds"][row["step"] - 1], "seconds": row["seconds"],
            "tokens": row["tokens"], "memory_gib": row["memory_peak_gib"], "agents": agents,
            "train_seconds": self.train_seconds, "micro_batches": len(rows), "rows": sum(rows),
            "fullest": max(rows, default=0),
        }  # fmt: skip
        print(json.dumps(told), flush=True)
        self.train_seconds, self.packed = {}, []

    def generate_alone(self, session: Any) -> None:
        """Each agent's turns of the last step, the others silent: as many prompts and tokens, no one to wait for."""
        if len(session.team.hosts) == 1:
            return
        dialogues = [credited.scored.dialogue for credited in self.rollouts[-1].credited]
        for name, host in session.team.hosts.items():
            host.forget()
            start = time.perf_counter()
            asyncio.run(_again(host, name, dialogues))
            self.alone[name] = time.perf_counter() - start


async def _again(host: Any, name: str, dialogues: Sequence[Dialogue]) -> None:
    """The turns of one agent, dialogue by dialogue at once, each as long as it was."""
    inner = getattr(host, "inner", host)

    async def one(dialogue: Dialogue) -> None:
        tokens: list[int] = []
        for turn in dialogue.turns[name]:
            tokens += turn.prompt_tokens
            sampling = Sampling(len(turn.generation.tokens), seed=dialogue.sample)
            generation = await inner.engine.generate(tokens, sampling)
            tokens += generation.tokens

    await asyncio.gather(*(one(dialogue) for dialogue in dialogues))


def main(asked: dict[str, Any]) -> None:
    """Runs the steps and prints the lines."""
    watched = Watched(asked)
    watched.install()
    begun = time.perf_counter()
    folder = training.train(load_config(_write(asked, Path(asked["folder"]))), fresh=True, command="bench step")
    print(json.dumps({"end": _end(asked, watched, len(read_metrics(folder)), time.perf_counter() - begun)}), flush=True)


def _end(asked: Mapping[str, Any], watched: Watched, steps: int, seconds: float) -> dict[str, Any]:
    """What is worked out once all is over: operations by step and agent, the peak of products, generation alone."""
    operations = []
    for rollout in watched.rollouts:
        by_agent = {}
        for name, hub in asked["agents"].items():
            kind, sizes = SHAPES[hub]
            given = [s for s in training_sequences(rollout.credited, name) if any(t.advantage for t in s.turns)]
            distinct, needed = work(kind(**sizes), given)
            by_agent[name] = {"distinct_tokens": distinct, "operations": needed}
        operations.append(by_agent)
    peak = peak_of_products() if torch.cuda.is_available() else None
    return {"operations": operations, "peak": peak, "generate_alone": watched.alone, "steps": steps, "seconds": seconds}


def _write(asked: Mapping[str, Any], folder: Path) -> Path:
    """Models' shapes, questions and the config; returns the config's path."""
    write = small_shape if asked["quick"] else write_shape
    agents = {}
    for name, hub in asked["agents"].items():
        agents[name] = {
            "model": str(write(hub, folder)), "random_weights": True, "chat_template": TEMPLATE, **asked["agent"],
        }  # fmt: skip
    vocabulary = 997 if asked["quick"] else 40_000
    for part, number in (("train", asked["questions"] * len(asked["kinds"])), ("validation", 1), ("test", 1)):
        draw = random.Random(part)
        texts = [" ".join(f"w{draw.randrange(5, vocabulary)}" for _ in range(PROMPT - 3)) for _ in range(number)]
        lines = [json.dumps({"question": text, "answer": "1"}) + "\n" for text in texts]
        (folder / f"{part}.jsonl").write_text("".join(lines))
    alone = len(agents) == 1
    tree = {
        "run": str(folder / "run"), "steps": len(asked["kinds"]), "protocol": "single" if alone else "idea3",
        "interaction": "none", "agents": agents, "memory_check": "warn",
        "data": {part: str(folder / f"{part}.jsonl") for part in ("train", "validation", "test")},
        "prompts": {"file": "short"},
        "rollout": {"questions": asked["questions"], "samples": asked["samples"], "peer_tokens": asked["most"],
                    "max_tokens": {"default": asked["most"]}, "ahead": asked.get("ahead", False)},
        "reward": {"name": f"{Chance.__module__ if __name__ != '__main__' else 'ilr_benchmarks.step_case'}:Chance"},
        "loss": asked.get("loss", TRL_LOSS),
        "evaluate": {"base": False, "validation_limit": 1}, "checkpoint": {"every": asked.get("checkpoint_every")},
        "log": {"tensorboard": False, "noise_every": None},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
