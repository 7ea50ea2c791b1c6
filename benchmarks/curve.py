"""GRPO's learning curve beside TRL's: held-out accuracy over steps and seconds, same problems, samples and rate.

    ilr-fast bench curve --rounds 3                 # one NVIDIA GPU with vLLM and TRL; two to three minutes a seed
    python -m ilr_benchmarks.curve 2,3 --out DIR    # seeds side by side, added to DIR/curve.json: curves without times
    python -m ilr_benchmarks.curve 1 --alone …      # one after the other, with times: some seeds of what `bench` runs
    python -m ilr_benchmarks.curve 1,2 loss.aggregation=grpo --only ilr-fast …      # ours with other keys

SmolLM2-135M-Instruct learns sums a + b of 1 to 50 from the bare prompt `Question: What is 12 + 7?\\nAnswer:`; an answer
ends with its line, is right where its one number (the last one of an equation) is the sum, and earns 1 or 0. Both take
32 questions × 8 samples a step at temperature 1, at most 12 tokens, AdamW with a constant rate, β = 0, one update a
step, a loss that is a mean over tokens, vLLM in the trainer's process, 70 steps. Of the 1,275 unordered pairs 300 are
held out and asked in both orders every second step, greedily, by each side's own vLLM (some 590 answers: one evaluation
has a standard error of 1.9 points, of 2.7 if the two orders were one question); the rest are trained on in both orders.
Ours is `configs/gpu/sums.yaml`, TRL's all else as TRL has it. What is counted, and when the target is met:
`curve_rule.py`.

Each run is a process of its own, ours before TRL's, and writes as it goes (into TMPDIR while it runs): a row is there
even where the process was ended. `seconds` are those of training: without start, evaluation and checkpoints, the first
steps' compilation included. A row's `curve` lists [step, samples, seconds, accuracy], `sampled` the share right
while training and `tokens` the mean length of an answer (ours of each step, TRL's the mean of two).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ilr_benchmarks.common import HERE, row, write_results
from ilr_benchmarks.curve_rule import OURS, THEIRS, Point, compared, reached

from ilr_fast.metrics import read_metrics
from ilr_fast.rewards.number import read_number

HIGH, HELD_OUT, TEST = 50, 300, 4  # pairs; a run must have a test
QUESTIONS, SAMPLES, STEPS, EVERY, RATE = 32, 8, 70, 2, 2e-5
QUICK_HELD = 4  # questions
MODEL, MOST_TOKENS = "smollm2-135m-instruct", 12  # as in configs/gpu/sums.yaml


def run(*, rounds: int, quick: bool, only_ours: bool, device: str) -> Iterator[dict[str, Any]]:
    """A row for each seed and side as its process ends, one after the other, then one that compares the sides."""
    found = []
    for seed in range(1, min(rounds, 3) + 1):
        for side in (OURS,) if only_ours else (OURS, THEIRS):
            found.append(one_run(side, seed, quick=quick))
            yield found[-1]
    yield from compared(found)


def one_run(
    side: str, seed: int, *, quick: bool, beside: bool = False, keys: Sequence[str] = ()
) -> dict[str, Any]:
    """Trains in a process of its own; a row, whatever became of it. `beside`: with others, so its times don't count.

    `keys` are more of our config's.
    """
    steps, every = (2, 1) if quick else (STEPS, EVERY)
    shape = f"SmolLM2-135M-Instruct, {QUESTIONS} × {SAMPLES} samples a step, lr {RATE:g}, seed {seed}"
    if side == THEIRS and not find_spec("trl"):
        return row(side, shape, [], status="TRL is not installed", seed=seed, curve=[])
    folder = Path(tempfile.mkdtemp(prefix=f"curve_{side}_{seed}_"))
    write_problems(folder, seed)
    command = ours(folder, seed, steps, every, quick) if side == OURS else theirs(folder, seed, steps, every, quick)
    if beside:
        command += ["memory_check=warn"] if side == OURS else ["--memory=0.2"]
    if side == OURS:
        command += keys
    began, start = time.time(), time.perf_counter()
    with open(folder / "log", "w") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment(side, seed)).returncode
    wall = time.perf_counter() - start
    if side == OURS:
        (curve, seconds), answers = our_curve(folder / "run", quick), our_answers(folder / "run")
    else:
        (curve, seconds), answers = their_curve(folder / "trl.jsonl"), their_answers(folder / "trl.jsonl")
    if status:
        print((folder / "log").read_text()[-2000:])
    else:
        shutil.rmtree(folder)
    return row(
        side, shape, seconds, status="timed" if not status else f"ended with {status}", seed=seed, curve=curve,
        **answers, keys=list(keys) if side == OURS else [], beside_others=beside, began=began, wall_seconds=wall,
        train_seconds=sum(seconds), **reached(curve),
    )  # fmt: skip


def pairs(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """(train, held out, test): each pair in both orders, no unordered pair in two of them."""
    every = [(a, b) for a in range(1, HIGH + 1) for b in range(a, HIGH + 1)]
    random.Random(f"sums {seed}").shuffle(every)
    held, test, rest = every[:HELD_OUT], every[HELD_OUT : HELD_OUT + TEST], every[HELD_OUT + TEST :]
    return sorted(_both_orders(rest)), _both_orders(held), _both_orders(test)


def _both_orders(part: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return list(dict.fromkeys([*part, *((b, a) for a, b in part)]))


def write_problems(folder: Path, seed: int) -> None:
    """train.jsonl, validation.jsonl and test.jsonl: rows with question and answer."""
    for name, part in zip(("train", "validation", "test"), pairs(seed), strict=True):
        rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def read_problems(file: Path) -> list[dict[str, str]]:
    """The rows of such a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def prompt(question: str) -> str:
    """The text of `chat_template: plain`."""
    return f"Question: {question}\nAnswer:"


def grade(text: str, answer: str) -> float:
    """1 for the right number on the first line, by the grader of our run."""
    first, _, _ = text.partition("\n")
    number = read_number(first)
    return float(number is not None and number == read_number(answer))


def ours(folder: Path, seed: int, steps: int, every: int, quick: bool) -> list[str]:
    """The command of our run."""
    keys: dict[str, Any] = {
        "run": folder / "run", "seed": seed, "steps": steps, "evaluate.every": every, "checkpoint.every": "null",
        "agents.smollm2.optimizer.lr": RATE, "evaluate.validation_limit": 2 * HELD_OUT,
    }  # fmt: skip
    keys |= {f"data.{name}": folder / f"{name}.jsonl" for name in ("train", "validation", "test")}
    keys |= {f"data.{name}_size": "null" for name in ("train", "validation", "test")}
    if quick:
        keys |= {"engine.name": "embedded", "engine.cache_gib": "null", "rollout.questions": 2, "data.test_size": 4,
                 "evaluate.validation_limit": QUICK_HELD}  # fmt: skip
    config = HERE.parent / "configs" / "gpu" / "sums.yaml"
    return [sys.executable, "-m", "ilr_fast.cli", "train", str(config), *(f"{k}={v}" for k, v in keys.items())]


def theirs(folder: Path, seed: int, steps: int, every: int, quick: bool) -> list[str]:
    """The command of TRL's run."""
    facts = {"folder": folder, "seed": seed, "steps": steps, "every": every, "lr": RATE}
    facts |= {"device": "cpu", "held": QUICK_HELD} if quick else {}
    return [sys.executable, "-m", "ilr_benchmarks.curve_trl", *(f"--{key}={value}" for key, value in facts.items())]


def environment(side: str, seed: int) -> dict[str, str]:
    """What TRL needs to be a group of one process."""
    alone = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "ERROR", "RANK": "0",
             "MASTER_ADDR": "localhost", "MASTER_PORT": str(29510 + seed), "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return {**os.environ, **(alone if side == THEIRS else {})}


def our_curve(run_folder: Path, quick: bool = False) -> tuple[list[Point], list[float]]:
    """The curve by the run's metrics, and each step's seconds without evaluation and checkpoint."""
    curve, seconds = [], []
    for at in read_metrics(run_folder):
        spent = at["seconds"]
        seconds.append(spent["total"] - (spent["evaluate"] or 0.0) - (spent["checkpoint"] or 0.0))
        accuracy = at["agents"]["smollm2"]["validation_accuracy"]
        if accuracy is not None:
            curve.append([at["step"], at["step"] * (2 if quick else QUESTIONS) * SAMPLES, sum(seconds), accuracy])
    return curve, seconds


def their_curve(file: Path) -> tuple[list[Point], list[float]]:
    """The same by the lines of curve_trl.py."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    curve = [[at["step"], at["step"] * QUESTIONS * SAMPLES, at["seconds"], at["accuracy"]]
             for at in lines if "accuracy" in at]  # fmt: skip
    return curve, [at["step_seconds"] for at in lines if "step_seconds" in at]


def our_answers(run_folder: Path) -> dict[str, list[float]]:
    """`sampled` and `tokens` of each step."""
    rows = read_metrics(run_folder)
    counts = [at["tokens"]["trained"] + at["tokens"]["dropped"] for at in rows]
    return {"sampled": [float(at["agents"]["smollm2"]["accuracy"]["single"]) for at in rows],
            "tokens": [count / QUESTIONS / SAMPLES for count in counts]}  # fmt: skip


def their_answers(file: Path) -> dict[str, list[float]]:
    """The same of every few steps, as TRL logs it."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    logs = [at for at in lines if "reward" in at]
    return {"sampled": [at["reward"] for at in logs], "tokens": [at["tokens"] for at in logs]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Learning curves of several seeds, side by side on one GPU")
    parser.add_argument("seeds", help="separated by commas")
    parser.add_argument("keys", nargs="*", help="more keys of our config: key=value")
    parser.add_argument("--out", type=Path, required=True, help="folder of curve.json, whose other rows stay")
    parser.add_argument("--only", choices=(OURS, THEIRS))
    parser.add_argument("--alone", action="store_true", help="one run at a time, nothing else on the card: times count")
    options = parser.parse_intermixed_args()
    file, seeds = options.out / "curve.json", [int(seed) for seed in options.seeds.split(",")]
    runs = [(side, seed) for seed in seeds for side in ((options.only,) if options.only else (OURS, THEIRS))]
    before = json.loads(file.read_text())["rows"] if file.exists() else []
    found = [r for r in before if r["status"] != "compared" and (r["variant"], r["seed"]) not in runs]
    with ThreadPoolExecutor(1 if options.alone else len(runs)) as threads:
        how = {"quick": False, "beside": not options.alone, "keys": options.keys}
        futures = [threads.submit(one_run, *run, **how) for run in runs]
        for done in as_completed(futures):
            found.append(done.result())
            write_results("curve", [*found, *compared(found)], "ilr-fast bench curve", options.out)


if __name__ == "__main__":
    main()
