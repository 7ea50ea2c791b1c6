"""A whole run of `bench memory`, by `train` itself, in a process of its own: prints a line of JSON for each step.

python -m ilr_benchmarks.memory_run '{"config": "configs/24gb/ilr_8b_7b_lora_vllm.yaml", "keys": ["steps=2"], …}'

The answers of random weights are right by a coin (coin.py) and as long as they may be. `memory_peak_gib` of a metrics
row is NVML's, of all processes, beyond what others held: it stands beside the plan of the config as it was filled in.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import transformers
from ilr_benchmarks.memory_case import wait_for_the_card, with_shapes

from ilr_fast.config_parse import load_config
from ilr_fast.memory import GIB
from ilr_fast.plan import Machine, plan_run
from ilr_fast.plan_command import settle, shapes_of
from ilr_fast.session import prepare
from ilr_fast.train import train

# Few questions that need no data set, and nothing measured before and after.
TASK = [
    *(f"data.{split}=task:largest" for split in ("train", "validation", "test")),
    "data.train_size=64", "data.validation_size=2", "data.test_size=8", "prompts.file=short", "interaction=none",
    "reward.name=ilr_benchmarks.coin:Coin", "evaluate.base=false", "log.tensorboard=false", "checkpoint.every=null",
]  # fmt: skip
QUICK = ["rollout.max_tokens=6", "rollout.peer_tokens=6"]


def main(asked: dict[str, Any]) -> None:
    folder, words = Path(asked["folder"]), transformers.PreTrainedTokenizerFast.from_pretrained
    setattr(transformers.AutoTokenizer, "from_pretrained", words)  # noqa: B010 (the shapes' is of no model's class)
    keys = [*TASK, *asked["keys"], f"run={folder / 'run'}", *(QUICK if asked["quick"] else ())]
    config = with_shapes(load_config(asked["config"], keys), folder, quick=asked["quick"])
    ready = prepare(config)
    wait_for_the_card()
    settled, _ = settle(ready.config, ready.contexts)
    machine = Machine({"cuda:0": int(asked["gib"] * GIB)}, None)
    planned = plan_run(settled, shapes_of(settled), machine, ready.contexts)
    over = threading.Event()
    teller = threading.Thread(target=_follow, args=(folder / "run/metrics.jsonl", planned.peak, over))
    teller.start()
    try:
        train(config, fresh=True)
    finally:
        over.set()
        teller.join()


def _follow(file: Path, planned: int, over: threading.Event) -> None:
    """Prints each step as it is logged, so that a run that is ended has told what it did, and how long it loaded."""
    told, last, begun = 0, False, time.perf_counter()
    while not last:
        last = over.wait(0.5)
        lines = file.read_text().splitlines() if file.is_file() else []
        for line in lines[told:]:
            row = json.loads(line)
            if row["step"] == 1:
                loaded = time.perf_counter() - begun - row["seconds"]["total"]
                print(json.dumps({"phase": "start", "seconds": [round(loaded, 1)]}), flush=True)
            print(json.dumps(_told(row, planned)), flush=True)
        told = len(lines)


def _told(row: dict[str, Any], planned: int) -> dict[str, Any]:
    """What a step took."""
    seconds, tokens = row["seconds"], row["tokens"]
    agents = row["agents"].values()
    return {
        "phase": f"step {row['step']}", "seconds": [round(seconds["total"], 3)],
        "planned_gib": round(planned / GIB, 2), "measured_gib": row["memory_peak_gib"],
        "torch_gib": max(agent["memory_peak_gib"] for agent in agents),
        "tokens_per_second": round(tokens["generated"] / seconds["generate"], 1),
        "trained_per_second": round(tokens["trained"] / seconds["train"], 1), "tokens": tokens,
        "phases": {phase: round(spent, 3) for phase, spent in seconds.items() if spent is not None},
        "logp_diff_mean": [agent["logp_diff_mean"] for agent in agents],
    }  # fmt: skip


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
