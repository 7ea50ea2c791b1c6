"""The agents at the table: from the config to tokenizers, chat formats, and hosts with their models.

`prepare_chats` needs no weights, so that a missing template or a prompt that is too long is refused within seconds;
`open_team` then loads the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ilr_fast.chat import ChatFormat
from ilr_fast.config import AgentConfig, Config
from ilr_fast.errors import UserError
from ilr_fast.hosts import Host
from ilr_fast.metrics import Timer
from ilr_fast.models import resolve_model
from ilr_fast.progress import Progress
from ilr_fast.residency import Residency, by_device, leaving
from ilr_fast.rollout import Seat

if TYPE_CHECKING:
    from ilr_fast.hosts.link import Link
    from ilr_fast.hosts.process import ProcessHost


@dataclass(frozen=True, slots=True)
class Team:
    """Hosts and seats by agent name, in the config's order."""

    hosts: Mapping[str, Host]
    seats: Mapping[str, Seat]
    residencies: Sequence[Residency] = ()
    stays: bool = False  # all weights are in this process, and nothing but an update moves or changes them

    @property
    def names(self) -> tuple[str, ...]:
        """The agents' names, in the config's order."""
        return tuple(self.hosts)

    def measure(self, timer: Timer) -> None:
        """Counts the seconds in which memory moves, from here on, for the phase `swap` of a step's timer."""
        for residency in self.residencies:
            residency.timer = timer

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

    UserError for a missing model, engine, device or template, or a template that rewrites turns and may not.
    """
    from transformers import AutoTokenizer

    from ilr_fast.engines.vllm_core import check_version
    from ilr_fast.loading import device_of

    device = device_of(agent, f"agents.{name}")
    if agent.engine.name == "vllm":
        check_version(f"agents.{name}", exact=agent.engine.exact and device.type == "cuda")
    where = f"agents.{name}.model = {agent.model}"
    folder = resolve_model(agent.model, where, weights=not agent.random_weights)
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
            apart = _start(config, logs, stack)
            turns = [name for name, agent in config.agents.items() if agent.engine.rests == "turns"]
            away = leaving(config)
            for name, process in apart.items():
                if name not in turns:
                    process.open()
            for name, agent in config.agents.items():
                if name not in apart:
                    hosts[name] = open_host(name, agent, config, chats[name])
                    stack.callback(hosts[name].close)
                    advance()
                else:
                    hosts[name] = apart[name]
                    if name in turns:
                        apart[name].open()
                        wait_until_ready([apart[name]], advance)
                if name in away:  # room for the next one
                    hosts[name].reside("away")
            wait_until_ready([process for name, process in apart.items() if name not in turns], advance)
        residencies, present = _residencies(config, hosts, away)
        seats = {name: Seat(host, chats[name]) for name, host in present.items()}
        yield Team(present, seats, residencies, stays=not apart and not turns)


def _residencies(
    config: Config, hosts: Mapping[str, Host], leave: set[str]
) -> tuple[tuple[Residency, ...], dict[str, Host]]:
    """The schedulers, one for each device on which something moves, and the hosts as the run uses them."""
    found, present = [], dict(hosts)
    for names in by_device(config).values():
        sleep = {name: config.agents[name].engine.rests for name in names}
        if any(kind != "never" for kind in sleep.values()):
            away = [name for name in names if name in leave]
            residency = Residency({name: hosts[name] for name in names}, sleep, away)
            found.append(residency)
            present |= residency.residents()
    return tuple(found), present


def _start(config: Config, logs: Path, stack: ExitStack) -> dict[str, ProcessHost]:
    """Starts the processes of those agents that have one; they load when they are opened."""
    from ilr_fast.hosts.process import ProcessHost
    from ilr_fast.hosts.sharing import served

    crew: list[Link] = []
    hosts = {}
    shared = config.mps == "auto" and _share_a_gpu(config)
    environment = stack.enter_context(served(shared, keep_step=not config.deterministic))
    for name, agent in config.agents.items():
        if agent.host == "process":
            hosts[name] = ProcessHost(name, config, logs, crew, environment)
            stack.callback(hosts[name].close)
    return hosts


def _share_a_gpu(config: Config) -> bool:
    """Whether the processes of several agents compute on one GPU at a time."""
    from ilr_fast.loading import device_of

    def there(name: str) -> bool:
        agent = config.agents[name]
        apart = agent.host == "process" and agent.engine.rests != "turns"
        return apart and device_of(agent, f"agents.{name}").type == "cuda"

    return any(sum(map(there, names)) > 1 for names in by_device(config).values())
