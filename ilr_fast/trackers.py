"""Where a step's numbers go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio.

The last two are optional packages and are imported only where `log.wandb` or `log.trackio` asks for them. A run that
goes on from a checkpoint takes some steps again: TensorBoard drops what it had of them, the others get the same run's
id again and show the later values.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ilr_fast.config import Config
from ilr_fast.config_parse import to_tree
from ilr_fast.durable import write_text
from ilr_fast.errors import UserError


class Tracker(Protocol):
    """Takes a step's numbers by path."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Logs one step."""
        ...

    def close(self) -> None:
        """Writes out what is buffered."""
        ...


def check_installed(name: str) -> None:
    """UserError where the package `name` of `log.name` is missing."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{name} is not installed", f"log.{name}", f"pip install {name}, or set log.{name}=false")


@contextmanager
def open_trackers(folder: Path, config: Config, resume_step: int) -> Iterator[Sequence[Tracker]]:
    """The trackers that `config.log` asks for, closed at the end. UserError where a package is missing."""
    wanted: dict[str, Callable[[Path, Config, int], Tracker]]
    wanted = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
    with ExitStack() as stack:
        trackers: list[Tracker] = []
        for name, kind in wanted.items():
            if getattr(config.log, name):
                check_installed(name)
                trackers.append(kind(folder, config, resume_step))
                stack.callback(trackers[-1].close)
        yield trackers


class TensorBoard:
    """Events in `folder`/tensorboard."""

    def __init__(self, folder: Path, config: Config, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        purge = resume_step + 1 if (folder / "tensorboard").is_dir() else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for path, value in numbers.items():
            self._writer.add_scalar(path, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of the project `ilr-fast` at Weights & Biases; set WANDB_MODE=offline to keep it on this machine."""

    def __init__(self, folder: Path, config: Config, resume_step: int):
        import wandb

        name = folder.resolve().name
        self._run: Any = wandb.init(
            project="ilr-fast", name=name, dir=str(folder), id=_run_id(folder), resume="allow", config=to_tree(config)
        )
        # Steps are an axis of ours: wandb's own counter refuses steps that a resumed run takes again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of the project `ilr-fast` in trackio's database on this machine."""

    def __init__(self, folder: Path, config: Config, resume_step: int):
        import trackio

        self._trackio: Any = trackio
        name = f"{folder.resolve().name}-{_run_id(folder)}"
        trackio.init(project="ilr-fast", name=name, resume="allow", config=to_tree(config))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._trackio.log(dict(numbers), step=step)

    def close(self) -> None:
        self._trackio.finish()


def _run_id(folder: Path) -> str:
    """The run's id at the trackers, drawn once and kept in its folder."""
    file = folder / "tracker_id"
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:8] + "\n")
    return file.read_text(encoding="utf-8").strip()
