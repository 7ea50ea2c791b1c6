"""Does a conversation fit an agent's context? Asked before any model is loaded.

The longest conversation about a question is written out with the agent's own tokenizer: every own turn at its limit,
every peer's text at `peer_tokens` (cut by the reader's tokenizer, so that this is a bound), under the longest of the
three interactions.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from ilr_fast.chat import ChatFormat
from ilr_fast.config import Config, RolloutConfig, turn_limit
from ilr_fast.errors import UserError
from ilr_fast.protocols import DialogueProtocol, View, load_protocol
from ilr_fast.quoting import quote
from ilr_fast.types import Interaction, Message, Question


def longest_prompt_tokens(
    question: Question,
    protocol: DialogueProtocol,
    chat: ChatFormat,
    settings: RolloutConfig,
    examples: Sequence[Message] = (),
    peers: int = 1,
) -> int:
    """Tokens of the longest prompt of the question's conversation: all before the last turn, earlier turns full."""
    return max(_prompt_tokens(question, i, protocol, chat, settings, examples, peers) for i in get_args(Interaction))


def check_context(
    splits: Mapping[str, Sequence[Question]],
    protocol: DialogueProtocol,
    chat: ChatFormat,
    config: Config,
    name: str,
    examples: Sequence[Message] = (),
) -> int:
    """UserError, naming the question's id, where a prompt of agent `name` can grow longer than its context.

    Returns the tokens of its longest conversation, the last turn included.

    The training questions are asked by `protocol`, the others by `single`. Only the longest question of a split is
    written out: what stands around it is the same for all.
    """
    limit = config.agents[name].engine.max_context or model_context(chat.tokenizer)
    most = 0
    single = load_protocol("single", config)
    for split, questions in splits.items():
        if not questions:
            continue
        longest = _longest(questions, chat)
        asked = protocol if split == "train" else single
        tokens = longest_prompt_tokens(longest, asked, chat, config.rollout, examples, len(config.agents) - 1)
        if limit is not None and tokens >= limit:
            raise UserError(
                f"the prompt of question {longest.id!r} can grow to {tokens} tokens; the context of {name} has {limit}",
                f"data.{split}",
                "leave such questions out, lower rollout.max_tokens, rollout.peer_tokens or prompts.examples, or raise "
                f"agents.{name}.engine.max_context",
            )
        most = max(most, tokens + turn_limit(config.rollout, asked.stages[-1]))
    return most if limit is None else min(most, limit)


def model_context(tokenizer: object) -> int | None:
    """The model's context from the config.json beside its tokenizer, else the tokenizer's own limit; None: unknown."""
    file = Path(str(getattr(tokenizer, "name_or_path", ""))) / "config.json"
    if file.is_file():
        tree = json.loads(file.read_text(encoding="utf-8"))
        positions = tree.get("max_position_embeddings") or tree.get("text_config", {}).get("max_position_embeddings")
        if isinstance(positions, int):
            return positions
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit and limit < 10**9 else None


def _longest(questions: Sequence[Question], chat: ChatFormat) -> Question:
    """The question of the most tokens, among the 200 of the most bytes (counting all of a large set takes seconds)."""
    candidates = heapq.nlargest(200, questions, key=lambda q: len(q.text.encode()))
    return max(candidates, key=lambda q: len(chat.tokens(q.text)))


def _prompt_tokens(
    question: Question,
    interaction: Interaction,
    protocol: DialogueProtocol,
    chat: ChatFormat,
    settings: RolloutConfig,
    examples: Sequence[Message],
    peers: int,
) -> int:
    total, longest = 0, 0
    full = quote(" a" * settings.peer_tokens)
    for number, stage in enumerate(protocol.stages):
        earlier = dict.fromkeys(protocol.stages[:number], full)
        heard = (dict.fromkeys(protocol.stages, full),) * peers
        message = protocol.message(stage, View(question, interaction, earlier, heard))
        prompt = chat.follow(message, "length") if number else chat.first([*examples, Message("user", message)])
        longest = total + len(prompt)
        total = longest + turn_limit(settings, stage)
    return longest
