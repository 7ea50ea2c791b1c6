"""Checkpoints that are whole or not there, checked by hash when read; the newest K and the best are kept.

    checkpoints/step_000010/<agent>/          weights and tokenizer, a Hugging Face folder
    checkpoints/step_000010/<agent>.state/    optimizer and anything random
    checkpoints/step_000010/state.json        step, validation_accuracy, agents, what the run adds
    checkpoints/step_000010/manifest.json     SHA-256 and size of every other file
    checkpoints/best → step_000010            the highest validation accuracy (of equals the newest)

A checkpoint is written into a hidden folder beside its place, flushed to the disk and renamed; what a kill or a full
disk leaves behind is hidden, and removed by the next save. Old checkpoints go only when the new one stands, so the disk
needs room for keep + 2 of them: the newest `keep`, the best, and the one being written. With AdamW in float32 one takes
12 bytes a parameter. Agents that don't train are not saved: their weights are their model's.

    save(run / "checkpoints", 10, hosts, {"seed": 0}, keep=2, score=0.61)
    newest_good(run / "checkpoints").restore(hosts)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ilr_fast.durable import TEMPORARY, clean, disk_errors, point, remove_tree, sync, sync_tree
from ilr_fast.errors import UserError

if TYPE_CHECKING:
    from ilr_fast.hosts import Host

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files have been checked. `score` is the validation accuracy, None where none was measured."""

    path: Path
    step: int
    score: float | None
    state: Mapping[str, Any]

    def restore(self, hosts: Mapping[str, Host]) -> None:
        """Loads weights and state into every host that trains; UserError where the agents are others."""
        trained = [name for name, host in hosts.items() if host.trains]
        if sorted(trained) != sorted(self.state["agents"]):
            raise UserError(
                f"it holds the agents {', '.join(self.state['agents'])}; the config trains {', '.join(trained)}",
                str(self.path),
                "use the config of the run, or give another run folder with run=…",
            )
        for name in trained:
            hosts[name].load(self.path / name, self.path / f"{name}.state")


def save(
    folder: Path, step: int, hosts: Mapping[str, Host], state: Mapping[str, Any], *, keep: int, score: float | None,
    on_read: Callable[[], None] = lambda: None,
) -> Path:  # fmt: skip
    """Writes `folder/step_…` atomically, then moves `best` and removes what need not be kept. Returns its path.

    `on_read` is called once all weights and states stand in copies (Host.hold), or else in files: what is left needs
    the agents no more; it may be called again. `state` is JSON; checkpoints of later steps (damaged ones that were
    skipped) are removed.
    A full disk raises UserError and leaves every earlier checkpoint as it was. Only one process may save into a folder.
    """
    assert keep >= 1 and step >= 1
    place = folder / f"step_{step:06d}"
    temporary = folder / f"{TEMPORARY}new-{place.name}"
    with disk_errors(folder, _remedy_for_full_disk(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder)
        try:
            _write(temporary, step, hosts, state, score, on_read)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if place.exists():
            _hide(place)
        os.replace(temporary, place)
        sync(folder)
        _prune(folder, step, keep)
    return place


def newest_good(folder: Path, fingerprint: str | None = None) -> Checkpoint | None:
    """The newest checkpoint whose files are whole, None where there is none; damaged ones are warned of and skipped.

    Raises UserError where all are damaged, and where its `fingerprint` is not the given one (another config's).
    """
    damages = []
    for path in reversed(_steps(folder)):
        damage = _damage(path)
        if damage is None:
            return _open(path, fingerprint)
        damages.append(damage)
        _log.warning("checkpoint skipped: %s", damage)
    if damages:
        raise UserError(
            f"no checkpoint can be read; of the newest: {damages[0]}",
            str(folder),
            "put a copy of its files back, or delete this folder to start the run over",
        )
    return None


def best_good(folder: Path, fingerprint: str | None = None) -> Checkpoint | None:
    """The checkpoint with the highest validation accuracy; the newest good one where none has any or it is damaged."""
    best = folder / "best"
    if best.exists():
        path = best.resolve()
        damage = _damage(path)
        if damage is None:
            return _open(path, fingerprint)
        _log.warning("best checkpoint skipped: %s", damage)
    return newest_good(folder, fingerprint)


def _open(path: Path, fingerprint: str | None) -> Checkpoint:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if fingerprint is not None and state.get("fingerprint") not in (None, fingerprint):
        raise UserError("a checkpoint of another config", str(path), "give another run folder with run=…")
    return Checkpoint(path, state["step"], state["validation_accuracy"], state)


def _write(
    folder: Path, step: int, hosts: Mapping[str, Host], state: Mapping[str, Any], score: float | None,
    on_read: Callable[[], None],
) -> None:  # fmt: skip
    folder.mkdir()
    trained = {name: host for name, host in hosts.items() if host.trains}
    if all([host.hold() for host in trained.values()]):
        on_read()
    for name, host in trained.items():
        for part, write in ((name, host.save_model), (f"{name}.state", host.save_state)):
            (folder / part).mkdir()
            write(folder / part)
    on_read()
    known = {"step": step, "validation_accuracy": _finite(score), "agents": list(trained)}
    (folder / "state.json").write_text(json.dumps({**state, **known}, indent=1) + "\n", encoding="utf-8")
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    manifest = {"files": dict(zip(files, _facts(folder, files), strict=True))}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync_tree(folder)


def _facts(folder: Path, files: list[str]) -> list[dict[str, Any]]:
    """SHA-256 and size of files; hashing leaves the interpreter's lock, so threads share the work."""

    def fact(name: str) -> dict[str, Any]:
        with open(folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"sha256": digest, "bytes": file.tell()}

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        return list(threads.map(fact, files))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, None where all are as they were written."""
    manifest = path / "manifest.json"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: (fact["bytes"], fact["sha256"]) for name, fact in files.items()}
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} can't be read ({error})"
    for name, (size, _) in expected.items():
        if not (path / name).is_file():
            return f"{path / name} is missing"
        if (path / name).stat().st_size != size:
            return f"{path / name} has {(path / name).stat().st_size} bytes instead of {size}"
    for name, fact in zip(expected, _facts(path, list(expected)), strict=True):
        if fact["sha256"] != expected[name][1]:
            return f"{path / name} is damaged (its SHA-256 differs from the manifest's)"
    return None if "state.json" in expected else f"{manifest} does not list state.json"


def _prune(folder: Path, step: int, keep: int) -> None:
    """Points `best`, and removes all but the best and the newest `keep` up to `step`."""
    past = [path for path in _steps(folder) if _number(path) <= step]
    best = max(past, key=lambda path: (_score(path), _number(path)))
    link = folder / "best"
    if link.is_dir() and not link.is_symlink():  # a run copied to where links are followed
        _put_aside(link)
    kept = set(past[-keep:])
    if _score(best) > -math.inf:
        kept.add(best)
        point(link, best.name)
    else:
        link.unlink(missing_ok=True)
    for path in _steps(folder):
        if path not in kept:
            _hide(path)
    sync(folder)
    clean(folder)


def _put_aside(copied: Path) -> None:
    """Removes a folder `best` whose step stands beside it; keeps one that stands alone, as `copied_best`."""
    if _stated(copied).get("step") in [_number(path) for path in _steps(copied.parent)]:
        remove_tree(copied)
        return
    place = copied.with_name("copied_best")
    if place.exists():
        remove_tree(place)
    os.replace(copied, place)
    _log.warning("the only copy of a best checkpoint is kept as %s", place)


def _hide(path: Path) -> None:
    """Gives a checkpoint a name that the next `clean` removes: a kill while files go leaves no half checkpoint."""
    os.replace(path, path.with_name(f"{TEMPORARY}old-{path.name}"))


def _steps(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the oldest first."""
    return sorted((p for p in folder.glob("step_*") if p.name[5:].isdigit() and p.is_dir()), key=_number)


def _number(path: Path) -> int:
    return int(path.name[5:])


def _score(path: Path) -> float:
    """A checkpoint's validation accuracy, −∞ where it has none."""
    score = _stated(path).get("validation_accuracy")
    return float(score) if isinstance(score, (int, float)) else -math.inf


def _stated(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json, empty where it can't be read."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _finite(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


def _remedy_for_full_disk(folder: Path) -> str:
    steps = _steps(folder)
    if not steps:
        return "free some space and run the same command again, or put run=… on a larger disk"
    size = sum(file.stat().st_size for file in steps[-1].rglob("*") if file.is_file()) / 2**30
    return (
        f"free some space (a checkpoint takes {size:.2f} GiB) and run the same command again: "
        f"it goes on from {steps[-1].name}"
    )
