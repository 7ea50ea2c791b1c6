"""The agents at the table: from the config to tokenizers, chat formats, and hosts with their models.

`prepare_chats` needs no weights, so that a missing template or a prompt that is too long is refused within seconds;
`open_team` then loads the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from ilr_fast.chat import ChatFormat
from ilr_fast.config import Config
from ilr_fast.errors import UserError
from ilr_fast.hosts import Host
from ilr_fast.models import resolve_model
from ilr_fast.rollout import Seat


@dataclass(frozen=True, slots=True)
class Team:
    """Hosts and seats by agent name, in the config's order."""

    hosts: Mapping[str, Host]
    seats: Mapping[str, Seat]

    @property
    def names(self) -> tuple[str, ...]:
        """The agents' names, in the config's order."""
        return tuple(self.hosts)

    def forget(self) -> None:
        """Empties the engines' caches. A cached prefix differs from one computed anew in its last bits, and a run that
        goes on has none: called before everything that such a run may begin with."""
        for host in self.hosts.values():
            host.forget()


def prepare_chats(config: Config) -> dict[str, ChatFormat]:
    """Each agent's chat format.

    UserError for a missing model, device or template, or a template that rewrites turns and may not.
    """
    from transformers import AutoTokenizer

    from ilr_fast.loading import device_of

    chats = {}
    for name, agent in config.agents.items():
        folder = resolve_model(agent.model, f"agents.{name}.model = {agent.model}")
        device_of(agent, f"agents.{name}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"its tokenizer can't be loaded ({error})", f"agents.{name}.model = {agent.model}",
                            "give a folder that holds the tokenizer's files too") from None
        chats[name] = ChatFormat(tokenizer, agent.chat_template, where=f"agents.{name}.chat_template")
        if agent.template_rewrites == "refuse" and chats[name].rewrites_earlier_turns():
            raise UserError("the template rewrites earlier turns", f"agents.{name}.chat_template",
                            "use another template, or `template_rewrites: keep` to train on the tokens as sampled")
    return chats


@contextmanager
def open_team(config: Config, chats: Mapping[str, ChatFormat]) -> Iterator[Team]:
    """Loads every agent; closes them all at the end."""
    from ilr_fast.hosts.local import open_host

    with ExitStack() as stack:
        hosts: dict[str, Host] = {}
        for name, agent in config.agents.items():
            hosts[name] = open_host(name, agent, config, chats[name])
            stack.callback(hosts[name].close)
        yield Team(hosts, {name: Seat(host, chats[name]) for name, host in hosts.items()})
