"""The agents at the table: from the config to tokenizers, chat formats, and hosts with their models.

`prepare_chats` needs no weights, so that a missing template or a prompt that is too long is refused within seconds;
`open_team` then loads the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ilr_fast.chat import ChatFormat
from ilr_fast.config import AgentConfig, Config
from ilr_fast.errors import UserError
from ilr_fast.hosts import Host
from ilr_fast.models import resolve_model
from ilr_fast.progress import Progress
from ilr_fast.rollout import Seat

if TYPE_CHECKING:
    from ilr_fast.hosts.link import Link
    from ilr_fast.hosts.process import ProcessHost


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
    """Each agent's chat format, by name; see `prepare_chat`."""
    return {name: prepare_chat(name, agent) for name, agent in config.agents.items()}


def prepare_chat(name: str, agent: AgentConfig) -> ChatFormat:
    """An agent's chat format.

    UserError for a missing model, device or template, or a template that rewrites turns and may not.
    """
    from transformers import AutoTokenizer

    from ilr_fast.loading import device_of

    folder = resolve_model(agent.model, f"agents.{name}.model = {agent.model}")
    device_of(agent, f"agents.{name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"its tokenizer can't be loaded ({error})", f"agents.{name}.model = {agent.model}",
                        "give a folder that holds the tokenizer's files too") from None
    chat = ChatFormat(tokenizer, agent.chat_template, where=f"agents.{name}.chat_template")
    if agent.template_rewrites == "refuse" and chat.rewrites_earlier_turns():
        raise UserError("the template rewrites earlier turns", f"agents.{name}.chat_template",
                        "use another template, or `template_rewrites: keep` to train on the tokens as sampled")
    return chat


@contextmanager
def open_team(
    config: Config, chats: Mapping[str, ChatFormat], *, logs: Path | None = None, progress: Progress | None = None
) -> Iterator[Team]:
    """Loads every agent; closes them all at the end. Processes load at the same time and write `logs`/NAME.log."""
    from ilr_fast.hosts.local import open_host
    from ilr_fast.hosts.process import wait_until_ready

    with ExitStack() as stack:
        hosts: dict[str, Host] = {}
        with (progress or Progress(0)).phase("loading", len(config.agents)) as advance:
            logs = logs or Path(stack.enter_context(TemporaryDirectory(prefix="ilr-fast-logs-")))
            away = _start(config, logs, stack)
            for name, agent in config.agents.items():
                if name in away:
                    hosts[name] = away[name]
                else:
                    hosts[name] = open_host(name, agent, config, chats[name])
                    stack.callback(hosts[name].close)
                    advance()
            wait_until_ready(away.values(), advance)
        yield Team(hosts, {name: Seat(host, chats[name]) for name, host in hosts.items()})


def _start(config: Config, logs: Path, stack: ExitStack) -> dict[str, ProcessHost]:
    """Starts the processes of those agents that have one, and does not wait for them."""
    from ilr_fast.hosts.process import ProcessHost

    crew: list[Link] = []
    hosts = {}
    for name, agent in config.agents.items():
        if agent.host == "process":
            hosts[name] = ProcessHost(name, config, logs, crew)
            stack.callback(hosts[name].close)
    return hosts
