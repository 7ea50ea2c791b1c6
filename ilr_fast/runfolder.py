"""The folder of one run: created, or taken up again where the same config's run stands there; one process at a time.

    with RunFolder.open(config, fresh=False, command="ilr-fast train …") as folder:
        folder.write_dialogues(1, credited)
        folder.write_results(rows)

Beside these it holds config.yaml, environment.json, metrics.jsonl, checkpoints/, report.html and tensorboard/. A folder
of something else, or of another config's run, is refused and left as it is. Keys that only say how long, how fast or
where the run goes on (`MAY_DIFFER`) may change when it does.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ilr_fast.config import AgentConfig, Config
from ilr_fast.config_parse import build, dump, read_yaml, to_tree
from ilr_fast.dialogue_rows import from_line, to_line
from ilr_fast.durable import TEMPORARY, clean, disk_errors, keep_lines, write_text
from ilr_fast.environment import environment
from ilr_fast.errors import UserError
from ilr_fast.types import Credited

MAY_DIFFER = (
    "run", "steps", "method", "threads", "hang_limit", "mps", "max_failed_share", "memory_check", "checkpoint.*",
    "log.*", "evaluate.*", "reward.workers", "agents.*.device", "agents.*.host", "agents.*.engine.slots",
    "agents.*.micro_batch_tokens", "agents.*.gradient_checkpointing", "agents.*.fused_layers", "agents.*.logits_mib",
    "agents.*.graph_tokens", "agents.*.optimizer.offload", "agents.*.engine.cache_gib", "agents.*.engine.sleep",
)  # fmt: skip
# `examples`: how many a few-shot base was shown; `samples`: answers to each question.
RESULT_KEY = ("agent", "method", "benchmark", "mode", "examples", "samples")
_REMEDY_FULL = "free some space and run the same command again: it goes on from what is there"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """An open run folder; its lock is freed when it is closed, or when the process dies."""

    path: Path
    fingerprint: str
    _lock: int = field(repr=False)

    @classmethod
    def open(cls, config: Config, *, fresh: bool, command: str) -> RunFolder:
        """Creates the folder `config.run` or goes on in it; `command` is what the user typed.

        Raises UserError where `fresh` meets an existing folder, for a folder of another run or of something else, one
        that another process writes, one that can't be written, and a full disk.
        """
        path = Path(config.run)
        if fresh and (path.exists() or path.is_symlink()):
            raise UserError("stands there already, and --fresh was given", str(path),
                            "give another folder with run=…, or leave --fresh out to go on in it")
        with disk_errors(path, _REMEDY_FULL):
            _check(path, config)
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path)
            try:
                _check(path, config)  # again: another process may have made it its own meanwhile
                folder = cls(path, fingerprint(config), lock)
                folder._write_heads(config, command)
            except BaseException:
                os.close(lock)
                raise
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the lock. The folder can't be written through this object afterwards."""
        os.close(self._lock)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def write_dialogues(self, step: int, credited: Sequence[Credited]) -> None:
        """Writes dialogues/step_….jsonl, replacing what stood there."""
        with disk_errors(self.path, _REMEDY_FULL):
            (self.path / "dialogues").mkdir(exist_ok=True)
            text = "".join(to_line(item) + "\n" for item in credited)
            write_text(_dialogues(self.path, step), text)

    def write_results(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows to results.json; see `write_results`."""
        write_results(self.path, rows)

    def discard_after(self, step: int) -> None:
        """Removes the dialogues and failures of steps after `step`: the run takes them again from its checkpoint."""
        for path in (self.path / "dialogues").glob("step_*.jsonl"):
            if path.stem[5:].isdigit() and int(path.stem[5:]) > step:
                path.unlink()
        keep_lines(self.path / "failures.jsonl", lambda line: _step_of(line) <= step)

    def _write_heads(self, config: Config, command: str) -> None:
        for folder in (self.path, self.path / "dialogues", self.checkpoints):
            clean(folder)
        earlier = _earlier_environments(self.path / "environment.json")
        now = environment(command) | ({"earlier": earlier} if earlier else {})
        write_text(self.path / "environment.json", json.dumps(now, indent=1, ensure_ascii=False) + "\n")
        write_text(self.path / "config.yaml", dump(config))


def fingerprint(config: Config) -> str:
    """A hash of the keys that a run may not change when it goes on, without those at their defaults: a key that a newer
    version adds leaves old checkpoints readable."""
    defaults = _flat(to_tree(Config(agents={name: AgentConfig() for name in config.agents})))
    keys = _flat(to_tree(config)).items()
    fixed = {path: value for path, value in keys if not _may_differ(path) and value != defaults.get(path)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_dialogues(run: Path, step: int) -> list[Credited]:
    """The dialogues of one step; UserError where there are none or a line can't be read."""
    path = _dialogues(run, step)
    if not path.is_file():
        steps = sorted(int(p.stem[5:]) for p in (run / "dialogues").glob("step_*.jsonl"))
        has = f"it has steps {steps[0]} to {steps[-1]}" if steps else "it has no dialogues yet"
        raise UserError(f"no dialogues of step {step}", str(run), has)
    found = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                found.append(from_line(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"not a dialogue ({error!r})", f"{path}, line {number}", "remove the line") from None
    return found


def write_results(run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to a folder's results.json, atomically; a row replaces one of the same `RESULT_KEY`."""
    merged = {tuple(row.get(key) for key in RESULT_KEY): dict(row) for row in [*read_results(run), *rows]}
    with disk_errors(run, _REMEDY_FULL):
        write_text(run / "results.json", json.dumps(list(merged.values()), indent=1, ensure_ascii=False) + "\n")


def read_results(run: Path) -> list[dict[str, Any]]:
    """The rows of results.json, none where there is no such file."""
    path = run / "results.json"
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [dict(row) for row in rows]
    except (ValueError, TypeError) as error:
        raise UserError(f"not a list of results ({error})", str(path), "move it away and evaluate again") from None


def _check(path: Path, config: Config) -> None:
    """Refuses a place that is not free and not this config's run."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError("is a file, not a folder", str(path), "give another folder with run=…")
    if not (path / "config.yaml").is_file():
        ours = ("lock", "environment.json")  # all that a kill at the very start leaves
        others = [p.name for p in path.iterdir() if p.name not in ours and not p.name.startswith(TEMPORARY)]
        if others:
            raise UserError(f"holds other things than a run ({', '.join(sorted(others)[:3])})", str(path),
                            "give a new or empty folder with run=…")
        return
    read_results(path)  # damaged, they would be noticed hours later
    differing = _differing(path / "config.yaml", config)
    if differing and holds_work(path):
        raise UserError("the folder of another run: " + "; ".join(differing), str(path),
                        "give another folder with run=…, or the keys as they were to go on in it")


def holds_work(path: Path) -> bool:
    """Whether anything was measured, said or learned there; a run that failed before that is no run to keep apart."""
    heads = ("lock", "environment.json", "config.yaml", "logs", "tensorboard")
    others = (p for p in path.iterdir() if p.name not in heads and not p.name.startswith(TEMPORARY))
    return any(not p.is_dir() or any(p.iterdir()) for p in others)


def _differing(file: Path, config: Config) -> list[str]:
    """The keys that differ from those a run was started with, as texts."""
    there = _flat(to_tree(build(Config, read_yaml(file), "", str(file))))
    here = _flat(to_tree(config))
    missing = "(not there)"
    return [
        f"{path} is {there.get(path, missing)!r} there, {here.get(path, missing)!r} here"
        for path in dict.fromkeys([*here, *there])
        if not _may_differ(path) and there.get(path, missing) != here.get(path, missing)
    ]


def _may_differ(path: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in MAY_DIFFER)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaf values by dotted path; an empty mapping is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _take_lock(path: Path) -> int:
    """Locks the folder; the system frees the lock with the process, however it ends."""
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 20).decode(errors="replace").strip()
        os.close(lock)
        raise UserError(f"another process writes this run (process {holder or 'unknown'})", str(path),
                        "wait for it or stop it, or give another folder with run=…") from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _earlier_environments(file: Path) -> list[dict[str, Any]]:
    """The environments in which this run was started before, the newest last."""
    if not file.is_file():
        return []
    try:
        last = json.loads(file.read_text(encoding="utf-8"))
        return [*last.pop("earlier", []), last]
    except (ValueError, AttributeError):
        return []


def _dialogues(run: Path, step: int) -> Path:
    return run / "dialogues" / f"step_{step:06d}.jsonl"


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
