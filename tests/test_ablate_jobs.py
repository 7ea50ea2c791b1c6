"""An ablation of tiny models with its runs side by side, what it says of them, and one run that fails."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from end_to_end import save_models, write_config
from rich.console import Console

from ilr_fast import ablate_jobs
from ilr_fast.cli import main
from ilr_fast.config_parse import load_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The ablation of two methods with two seeds, three runs at a time."""
    folder = tmp_path_factory.mktemp("ablation")
    models = save_models(folder)
    evaluate = {"every": 1, "benchmarks": ["task:sums"], "benchmark_limit": 6}
    file = write_config(folder, models, steps=1, evaluate=evaluate, checkpoint={"every": None},
                        log={"tensorboard": False})  # fmt: skip
    methods = ["--methods", "ilr,grpo", "--seeds", "1,2"]
    assert main(["ablate", str(file), *methods, "--jobs", "3"]) == 0
    return folder / "run-ablation"


def test_every_run_is_there_and_its_tokens_are_stated(folder):
    found = json.loads((folder / "ablation.json").read_text())
    names = [f"{name}-seed{s}" for name in ("grpo-ada", "grpo-bob", "ilr") for s in (1, 2)]
    assert [run["run"] for run in found["runs"]] == names
    assert all(run["finished"] and run["steps_done"] == 1 for run in found["runs"])
    for run in found["runs"]:  # 2 questions × 3 samples × 3 turns of 1 or 2 tokens, whoever talks
        assert all(18 <= count <= 36 for count in run["tokens_generated"].values()), run
    assert not list(folder.glob("*/checkpoints/*")) and (folder / "report.html").is_file()


def test_rows_compare_over_seeds(folder):
    rows = json.loads((folder / "ablation.json").read_text())["rows"]
    cells = {(row["agent"], row["method"], row["benchmark"]): row for row in rows}
    methods = ("base", "grpo", "ilr")
    assert set(cells) == {(a, m, b) for a in ("ada", "bob") for m in methods for b in ("test", "task:sums")}
    row = cells["ada", "ilr", "test"]
    assert row["seeds"] == [1, 2] and row["n"] == 8 and set(row["against"]) == {"base", "grpo"}
    assert math.isclose(row["accuracy"], sum(row["accuracy_by_seed"].values()) / 2)
    low, high = row["against"]["grpo"]["ci95"]
    assert row["against"]["grpo"]["verdict"] == ("better" if low > 0 else "worse" if high < 0 else "none")
    assert cells["ada", "base", "test"]["against"] == {} and cells["ada", "base", "test"]["tokens_generated"] is None


def test_what_is_finished_is_skipped_and_what_fails_is_named(folder, capsys):
    before = (folder / "ilr-seed1" / "metrics.jsonl").stat().st_mtime_ns
    (folder / "grpo-ada-seed1" / "results.json").write_text("{")  # can't go on
    file = folder.parent / "config.yaml"
    assert main(["ablate", str(file), "--methods", "ilr,grpo", "--seeds", "1,2", "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert "grpo-ada-seed1" in said.err and "1 of 6" in said.err and "logs/NAME.log" in said.err
    assert "ilr-seed1, finished before" in said.out
    assert (folder / "ilr-seed1" / "metrics.jsonl").stat().st_mtime_ns == before
    assert "not a list of results" in (folder / "logs" / "grpo-ada-seed1.log").read_text()


TRAINS = """
import pathlib, sys, time
place = pathlib.Path(sys.argv[1])
try:
    place.with_suffix(".begun").touch()
    time.sleep(30)
except KeyboardInterrupt:
    place.with_suffix(".checkpoint").touch()
"""


def test_a_terminated_ablation_leaves_no_run_behind(tmp_path, monkeypatch):
    processes = []

    def start(config, jobs, folder):
        name = Path(config.run).name
        process = subprocess.Popen([sys.executable, "-c", TRAINS, str(tmp_path / name)], start_new_session=True)
        processes.append(process)
        return ablate_jobs._Running(name, process, time.monotonic())

    def terminate():
        while len(list(tmp_path.glob("*.begun"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ablate_jobs, "_start", start)
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # what it was is there again afterwards
    try:
        config = load_config(write_config(tmp_path, tmp_path))
        configs = [replace(config, run=str(tmp_path / name)) for name in ("one", "two", "three")]
        threading.Thread(target=terminate, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            ablate_jobs.run_side_by_side(configs, 2, tmp_path, Console(file=StringIO()))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)
    assert {path.stem for path in tmp_path.glob("*.checkpoint")} == {"one", "two"}


def test_a_killed_ablation_s_runs_write_their_checkpoint_and_end(tmp_path):
    file = write_config(tmp_path, save_models(tmp_path), steps=1000, log={"tensorboard": False})
    script = f"""
import pathlib, sys, time
from ilr_fast import ablate_jobs
from ilr_fast.config_parse import load_config
run = ablate_jobs._start(load_config({str(file)!r}), 1, pathlib.Path({str(tmp_path)!r}))
print(run.process.pid, flush=True)
time.sleep(100)
"""
    (tmp_path / "configs").mkdir()
    (tmp_path / "logs").mkdir()
    ablation = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    run, folder = Path("/proc", ablation.stdout.readline().strip()), Path(load_config(file).run)
    until(lambda: (folder / "metrics.jsonl").exists())
    ablation.kill()
    ablation.communicate()
    until(lambda: not run.exists())
    assert list(folder.glob("checkpoints/step_*/manifest.json"))


def until(done):
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)
