"""`bench memory` and `bench memory_layers` on the CPU: each phase of a run has a row, and so has a run that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from ilr_benchmarks import memory

from ilr_fast.cli import main


def rows_of(name: str, folder: Any) -> list[dict[str, Any]]:
    return json.loads((folder / f"{name}_quick.json").read_text())["rows"]


def test_each_phase_of_a_run_is_set_beside_the_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("ILR_MEMORY_CASES", "by turns")
    monkeypatch.setattr(memory, "CASES", {n: case for n, case in memory.CASES.items() if not case.keys})
    assert main(["bench", "memory", "--quick", "--out", str(tmp_path)]) == 0
    rows = {row["variant"].partition(": ")[2]: row for row in rows_of("memory", tmp_path)}
    assert list(rows) == ["load", "generate", "update llama", "update qwen", "whole step"]
    assert all(row["planned_gib"] > 0.5 for phase, row in rows.items() if phase != "whole step")
    assert len(rows["whole step"]["swap_seconds"]) == 2 and all(row["ms"] > 0 for row in rows.values())


def test_a_whole_run_tells_its_steps_and_one_that_fails_says_how(tmp_path, monkeypatch):
    keys = ("steps=1", "rollout.questions=1")
    config = "24gb/ilr_8b_7b_lora.yaml"
    cases = {"runs": memory.Case(config, keys=keys), "fails": memory.Case(config, keys=(*keys, "reward.name=none"))}
    monkeypatch.setattr(memory, "CASES", cases)
    assert main(["bench", "memory", "--quick", "--out", str(tmp_path)]) == 1
    start, step, failed = rows_of("memory", tmp_path)
    assert start["variant"] == "runs: start" and start["ms"] > 0
    assert step["variant"] == "runs: step 1" and step["phases"]["swap"] > 0 and step["tokens"]["generated"] > 0
    assert failed["variant"] == "fails" and "no grader called 'none'" in failed["status"]


@pytest.mark.parametrize(("code", "said"), [("import time; time.sleep(60)", "more than 1 s"),
                                            ("import os; os.kill(os.getpid(), 9)", "it was killed (SIGKILL)"),
                                            ("raise SystemExit(3)", "status 3")])  # fmt: skip
def test_a_run_that_took_too_long_is_told_from_one_that_was_killed(code, said, tmp_path):
    limit = 1 if "sleep" in code else 30
    command = [sys.executable, "-c", f"print('ready', flush=True); input(); {code}"]
    (tmp_path / "log").touch()
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    (row,) = memory._rows("run", memory.Case("", limit=limit), worker, tmp_path / "log")
    assert row["status"].startswith("wrong: it ") and said in row["status"]


def test_a_run_with_vllm_is_left_out_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("ilr_fast.engines.vllm_core._version", lambda package: None)
    monkeypatch.setenv("ILR_MEMORY_CASES", "vLLM, a whole run")
    assert main(["bench", "memory", "--quick", "--out", str(tmp_path)]) == 0
    (row,) = rows_of("memory", tmp_path)
    assert row["ms"] is None and "vLLM is not installed" in row["status"]


def test_layers_are_planned_for_each_way_to_compute_again(tmp_path, monkeypatch):
    from ilr_benchmarks import memory_layers

    pytest.importorskip("peft")
    cases = {n: c for n, c in memory_layers.SHAPES.items() if n in ("8B, LoRA", "3B, full")}
    monkeypatch.setattr(memory_layers, "SHAPES", cases)
    assert main(["bench", "memory_layers", "--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of("memory_layers", tmp_path)
    assert len(rows) == 3 * len(cases)
    for n in (0, 3):  # no recomputation, half of it, all of it
        kept = [row["parts"]["activations"] for row in rows[n : n + 3]]
        assert kept[0] > kept[1] > kept[2]
