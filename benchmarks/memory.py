"""The plan's memory against the card's, for runs on a card whose memory but for 22 or 78 GiB a ballast holds.

    ilr-fast bench memory                                     # one NVIDIA GPU; the ballast makes it a smaller card
    ILR_MEMORY_CASES="QLoRA;3B" ilr-fast bench memory        # those whose name has one of these in it

True shapes with random weights (shapes.py), the vetted configs' own keys, few questions. Each run is a process of its
own: it loads its agents as training does, generates from prompts that leave room for some tokens, and updates on
sequences as long as the context; NVML's peak of each phase, all processes together, stands beside the plan's. Others
are whole runs by `train`, with the peak of each step. A run that needs more than the card has fails, as on a small
card; one that takes too long is ended, and the next one begun.

    variant     the config, and the phase          planned_gib, measured_gib     ratio = planned / measured
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ilr_benchmarks.ballast import ballast
from ilr_benchmarks.common import row

from ilr_fast.config_parse import load_config
from ilr_fast.engines.vllm_core import check_version
from ilr_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SMALL, LARGE = 22.0, 78.0  # GiB that cards of 24 and 80 GB have free
WITHIN = 0.1


class Case(NamedTuple):
    """A config, the sequences of an agent's update, the tokens of each request, and the seconds that it may take.

    With `keys` a whole run by `train` with these keys (memory_run.py), else phase by phase (memory_case.py).
    """

    config: str
    sequences: int = 0
    tokens: int = 0
    limit: int = 170
    keys: tuple[str, ...] = ()
    ada: bool = False  # with no kernel that needs a Hopper card
    card: float = SMALL  # GiB

    @property
    def shape(self) -> str:
        """What the rows say of it."""
        return f"a card of {self.card:g} GiB (ballast), true shapes with random weights"


WHOLE = "rollout.questions=1", "rollout.max_tokens=192", "rollout.peer_tokens=128"  # 48 turns of 192 tokens a step



def _large(config: str, *keys: str) -> Case:
    """A whole run for a card of 80 GB, whose dialogues fill micro-batches of 16,384 tokens."""
    return Case(f"80gb/{config}.yaml", keys=("steps=2", *keys), card=LARGE)


CASES = {
    "GRPO, 8B, LoRA, 8,192 tokens": Case("24gb/grpo_8b_lora.yaml", 2, 16),
    "ILR, 8B and 7B, QLoRA": Case("24gb/ilr_8b_7b_qlora.yaml", 4, 24),
    "ILR, 1.5B and 1.7B, full": Case("24gb/ilr_two_1.5b_full.yaml", 8, 24),
    "ILR, 8B and 7B, LoRA, by turns": Case("24gb/ilr_8b_7b_lora.yaml", 8, 24),
    "GRPO, 3B, full": Case("24gb/grpo_3b_full.yaml", 8, 24),
    "ILR, 1.5B and 1.7B, full, kernels of an RTX 4090": Case("24gb/ilr_two_1.5b_full.yaml", 8, 24, ada=True),
    "ILR, 8B and 7B, LoRA, vLLM, a whole run": Case("24gb/ilr_8b_7b_lora_vllm.yaml", keys=("steps=2", *WHOLE)),
    "ILR, 8B and 7B, QLoRA, a whole run": Case("24gb/ilr_8b_7b_qlora.yaml", keys=("steps=1", *WHOLE)),
    "80 GB: ILR, 8B and 7B, LoRA": _large(
        "ilr_8b_7b_lora", "rollout.questions=2", "rollout.max_tokens=224", "rollout.peer_tokens=128"
    ),
    "80 GB: ILR, 1.5B and 1.7B, full": _large(
        "ilr_two_1.5b_full", "rollout.questions=8", "rollout.max_tokens=128", "rollout.peer_tokens=96"
    ),
    "80 GB: GRPO, 8B, LoRA": _large("grpo_8b_lora", "rollout.questions=2", "rollout.max_tokens=1000"),
    "80 GB: GRPO, 3B, full": _large("grpo_3b_full", "rollout.questions=10", "rollout.max_tokens=384"),
}


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """Rows by run and phase; a run that fails has a row that says how. `quick`: small shapes, on the CPU."""
    wanted = [part for part in os.environ.get("ILR_MEMORY_CASES", "").split(";") if part]
    chosen = {n: case for n, case in CASES.items() if not wanted or any(part in n for part in wanted)}
    with ExitStack() as stack:
        places = {name: Path(stack.enter_context(tempfile.TemporaryDirectory())) for name in chosen}
        lacking = {name: _lacking(case) for name, case in chosen.items()}
        yield from (row(name, CASES[name].shape, [], status=what) for name, what in lacking.items() if what)
        chosen = {name: case for name, case in chosen.items() if not lacking[name]}
        workers: dict[str, subprocess.Popen[str]] = {}
        for number, (name, case) in enumerate(chosen.items()):
            for soon in list(chosen)[number : number + 2]:  # the next one imports what it needs while this one runs
                if soon not in workers:
                    workers[soon] = stack.enter_context(_begun(chosen[soon], places[soon], quick))
            with ExitStack() as held:
                try:
                    if device != "cpu":
                        held.enter_context(ballast(case.card))
                except RuntimeError as error:
                    yield row(name, case.shape, [], status=str(error))
                    continue
                for found in _rows(name, case, workers[name], places[name] / "log"):
                    print({k: v for k, v in found.items() if v is not None}, flush=True)
                    yield found


@contextmanager
def _begun(case: Case, folder: Path, quick: bool) -> Iterator[subprocess.Popen[str]]:
    """A case's process, which imports what it needs and waits for the card."""
    asked = {
        "config": str(ROOT / "configs" / case.config), "folder": str(folder), "quick": quick, "gib": case.card,
        "sequences": case.sequences, "tokens": case.tokens, "keys": case.keys, "ada": case.ada,
    }  # fmt: skip
    module = f"ilr_benchmarks.memory_{'run' if case.keys else 'case'}"
    command = [sys.executable, "-m", module, json.dumps(asked)]
    with (folder / "log").open("w") as log:
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()


def _rows(name: str, case: Case, worker: subprocess.Popen[str], log: Path) -> Iterator[dict[str, Any]]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdout.readline()  # it is ready, or has ended
    late, over = threading.Event(), threading.Timer(case.limit, lambda: (late.set(), worker.kill()))
    over.start()
    with suppress(BrokenPipeError):
        worker.stdin.write("\n")
        worker.stdin.close()
    for line in worker.stdout:
        if line.startswith("{"):
            yield _row(name, case, json.loads(line))
    status = worker.wait()
    over.cancel()
    said = log.read_text()
    print(said if len(said) < 16000 else f"{said[:8000]}\n…\n{said[-8000:]}", file=sys.stderr, flush=True)
    if status != 0:
        why = f"it took more than {case.limit} s" if late.is_set() else _ended(status, said)
        yield row(name, case.shape, [], status=f"wrong: {why}")


def _ended(status: int, said: str) -> str:
    """How a run ended that failed by itself: its last error, or the signal that ended it without a word."""
    errors = [line for line in said.splitlines() if "Error" in line]
    if status == -signal.SIGKILL:  # by the kernel, where the host's memory ran out, or by somebody
        return "it was killed (SIGKILL): the host's memory may have run out"
    return errors[-1][:300] if errors else f"it ended with status {status}"


def _lacking(case: Case) -> str | None:
    """What this machine lacks for a case; None: nothing."""
    if any(agent.engine.name == "vllm" for agent in load_config(str(ROOT / "configs" / case.config)).agents.values()):
        try:
            check_version("bench memory")
        except UserError as error:
            return str(error).splitlines()[0]
    return None


def _row(name: str, case: Case, told: dict[str, Any]) -> dict[str, Any]:
    """One phase's row; seconds are of one pass."""
    planned, measured = told.get("planned_gib"), told.get("measured_gib")
    ratio = planned / measured if planned and measured else None
    seconds = told.pop("seconds", None)
    return row(
        f"{name}: {told.pop('phase')}", case.shape, [] if seconds is None else seconds, **told, ratio=ratio,
        target="within 10%", met=None if ratio is None else abs(ratio - 1) <= WITHIN,
    )  # fmt: skip
