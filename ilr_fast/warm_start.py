"""A short supervised start on worked solutions, for models that never answer right by themselves.

    python -m ilr_fast.warm_start configs/small/easy.yaml runs/easy-start --passes 2 --examples 300

Every agent of the config learns the answers in the form of `prompts.worked`, after the very prompt of the run (worked
examples included), from the first so many training questions; runs/easy-start/<agent> is then a model like any other.
It is the trainer's own update: the policy gradient on-policy of a text with advantage 1 is that of its cross-entropy,
so learning rate, precision and batches are the config's. What else the config's loss says (importance weights, KL,
several updates) is left out: nobody sampled these texts. Questions without a written solution are passed over. An
experiment that begins so has to say so. A model that stands in the folder is not written over.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ilr_fast.agent import Agent
from ilr_fast.chat import ChatFormat
from ilr_fast.config import LossConfig
from ilr_fast.config_parse import load_config
from ilr_fast.errors import RunError, UserError
from ilr_fast.protocols.templates import load_prompts
from ilr_fast.session import Ready, prepare
from ilr_fast.types import Question, TrainingSequence, TrainingTurn


def warm_start(ready: Ready, folder: Path, *, passes: int, examples: int | None, batch: int) -> list[Path]:
    """Trains each agent that learns and returns the folders of their models, made in `folder`.

    `examples`: the first so many training questions (None: all), seen `passes` times in batches of `batch`. UserError
    where one of the folders is there and not empty, or no question has a written solution, before anything is loaded.
    """
    config, made = ready.config, []
    learning = {name: agent for name, agent in config.agents.items() if agent.train != "none"}
    for name in learning:
        if (folder / name).exists() and (not (folder / name).is_dir() or any((folder / name).iterdir())):
            raise UserError("something stands there, and is not written over", str(folder / name),
                            "give another folder, or take that one away")
    questions = [question for question in ready.splits["train"] if question.solution][:examples]
    if not questions:
        raise UserError("no training question has a written solution", "data.train", "use another set")
    steps = passes * math.ceil(len(questions) / batch)
    plain = replace(config, steps=steps, loss=LossConfig(aggregation=config.loss.aggregation))
    for name, agent in learning.items():
        learner = Agent(name, agent, plain, ready.chats[name].tokenizer)
        sequences = demonstrations(ready, ready.chats[name], questions)
        draw = random.Random(config.seed)
        step = 0
        for number in range(passes):
            draw.shuffle(sequences)
            for start in range(0, len(sequences), batch):
                step += 1
                result = learner.update(sequences[start : start + batch], step)
            print(f"{name}: pass {number + 1} of {passes}, last batch: entropy {result.metrics['entropy']}", flush=True)
        learner.save_model(folder / name)
        made.append(folder / name)
    return made


def demonstrations(ready: Ready, chat: ChatFormat, questions: Sequence[Question]) -> list[TrainingSequence]:
    """Each question under the run's prompt with its worked answer and the end of a turn, as one turn of advantage 1."""
    prompts = load_prompts(ready.config.prompts.file, ready.config.reward.name)
    made = []
    for number, question in enumerate(questions):
        asked, answered = prompts.worked([question])
        prompt = chat.first([*ready.examples, asked])
        turn = answer_tokens(chat, answered.content)
        place = TrainingTurn(len(prompt), len(prompt) + len(turn), 1.0, (0.0,) * len(turn))
        made.append(TrainingSequence(f"{question.id} {number}", 0, (*prompt, *turn), (place,)))
    return made


def answer_tokens(chat: ChatFormat, text: str) -> list[int]:
    """What a model would sample to say `text`: its tokens, and what ends a turn."""
    if chat.stop_strings:  # the line of `plain`, which begins with a space
        return chat.tokens(f" {text}{chat.stop_strings[0]}")
    return [*chat.tokens(text), chat.stop_tokens[0]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 for the user's mistakes, 1 where it failed."""
    parser = argparse.ArgumentParser(description="A short supervised start on worked solutions.")
    parser.add_argument("config")
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--passes", type=_count, default=1)
    parser.add_argument("--examples", type=_count, help="the first so many training questions; default: all")
    parser.add_argument("--batch", type=_count, default=32)
    given = parser.parse_intermixed_args(arguments)
    try:
        ready = prepare(load_config(given.config, given.overrides))
        warm_start(ready, given.folder, passes=given.passes, examples=given.examples, batch=given.batch)
    except (UserError, RunError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
