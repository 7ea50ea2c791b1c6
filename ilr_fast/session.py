"""What stays the same over a run: config, questions, protocol, grader, agents, run folder.

`prepare` does all that needs no model's weights and refuses bad input; `open_session` then loads the agents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from ilr_fast.card import PeakSampler
from ilr_fast.chat import ChatFormat
from ilr_fast.config import Config
from ilr_fast.data import check_disjoint, load_splits
from ilr_fast.difficulty import from_levels
from ilr_fast.errors import UserError
from ilr_fast.evaluate import few_shot_examples, open_grader
from ilr_fast.evaluate_papers import Paper, paper
from ilr_fast.gradable import check_gradable
from ilr_fast.metrics import check_trackers
from ilr_fast.progress import Progress
from ilr_fast.protocols import DialogueProtocol, load_protocol
from ilr_fast.protocols.templates import load_prompts
from ilr_fast.rewards import Grader
from ilr_fast.rollout import check_context
from ilr_fast.runfolder import RunFolder
from ilr_fast.team import Team, open_team, prepare_chats
from ilr_fast.types import Message, Question


@dataclass(frozen=True, slots=True)
class Ready:
    """A run that has been checked, before any weights are loaded."""

    config: Config
    splits: Mapping[str, Sequence[Question]]
    chats: Mapping[str, ChatFormat]
    protocol: DialogueProtocol
    examples: Sequence[Message]
    contexts: Mapping[str, int]  # tokens of each agent's longest conversation
    benchmarks: Sequence[Paper] = ()


@dataclass(frozen=True, slots=True)
class Session:
    """A run with its agents loaded."""

    ready: Ready
    folder: RunFolder
    team: Team
    grader: Grader
    progress: Progress
    card: PeakSampler

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.ready.config


def prepare(config: Config) -> Ready:
    """Loads questions, templates and prompts, and checks that they fit together. Raises UserError."""
    check_trackers(config.log)
    splits = load_splits(config.data, config.seed)
    there, wanted = len(splits["train"]), config.rollout.questions + config.rollout.refill
    if there < wanted:
        raise UserError(f"{there} training questions, fewer than the {wanted} of a step (refill included)",
                        "data.train, rollout.questions", "give more questions, or ask fewer in a step")
    protocol = load_protocol(config.protocol, config)
    with open_grader(config) as grader:
        for part, questions in splits.items():
            check_gradable(grader, questions, f"data.{part}, reward.name = {config.reward.name}")
    if config.difficulty.estimator == "level" and config.interaction == "dynamic":
        from_levels(splits["train"], config.difficulty.levels)
    chats = prepare_chats(config)
    prompts = load_prompts(config.prompts.file, config.reward.name)
    for count in config.evaluate.few_shot:
        few_shot_examples(splits["train"], count, config.seed, prompts)
    examples = few_shot_examples(splits["train"], config.prompts.examples, config.seed, prompts)
    contexts = {
        name: check_context(splits, protocol, chat, config, name, examples) for name, chat in chats.items()
    }
    return Ready(config, splits, chats, protocol, examples, contexts, _benchmarks(config, splits))


def _benchmarks(config: Config, splits: Mapping[str, Sequence[Question]]) -> list[Paper]:
    """`evaluate.benchmarks`, none of whose questions may be trained on."""
    found = []
    for name in config.evaluate.benchmarks:
        where = f"evaluate.benchmarks: {name}"
        found.append(paper(name, config, config.evaluate.benchmark_limit, where=where))
        check_disjoint({"train": splits["train"], name: found[-1].questions}, where)
    return found


@contextmanager
def open_session(ready: Ready, folder: RunFolder, progress: Progress, card: PeakSampler) -> Iterator[Session]:
    """Loads the agents and starts the verifiers; closes both at the end."""
    with ExitStack() as stack:
        grader = open_grader(ready.config)
        stack.callback(grader.close)
        logs = folder.path / "logs"
        team = stack.enter_context(open_team(ready.config, ready.chats, logs=logs, progress=progress))
        yield Session(ready, folder, team, grader, progress, card)
