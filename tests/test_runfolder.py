"""One folder, one run, one writer: what is refused stays untouched, what is written is whole."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ilr_fast.config import AgentConfig, CheckpointConfig, Config, DataConfig, LogConfig, RolloutConfig
from ilr_fast.config_parse import load_config
from ilr_fast.durable import TEMPORARY
from ilr_fast.errors import UserError
from ilr_fast.runfolder import RunFolder, fingerprint, read_dialogues, read_results, write_results
from ilr_fast.types import Credited, Dialogue, Generation, Grade, Question, Scored, Turn


def config(path: Path, **changes) -> Config:
    agents = {"a": AgentConfig(model="m"), "b-1.7b": AgentConfig(model="n")}
    data = DataConfig(train="t", validation="v", test="u")
    return replace(Config(run=str(path), agents=agents, data=data), **changes)


def start(path: Path, *, fresh: bool = False, command: str = "ilr-fast train my.yaml", **changes) -> RunFolder:
    return RunFolder.open(config(path, **changes), fresh=fresh, command=command)


def refused(path: Path, **options) -> UserError:
    before = snapshot(path)
    with pytest.raises(UserError) as caught:
        start(path, **options)
    assert snapshot(path) == before, "a refused folder is left as it is"
    assert caught.value.remedy and str(path) in caught.value.where
    return caught.value


def snapshot(path: Path) -> dict:
    return {str(p): p.read_bytes() if p.is_file() else None for p in [path, *path.rglob("*")] if p.exists()}


def test_creates_config_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_geheim")
    run = tmp_path / "deep" / "run"
    with start(run) as folder:
        assert folder.path == run and folder.checkpoints == run / "checkpoints"
    assert load_config(run / "config.yaml") == config(run)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["command"] == "ilr-fast train my.yaml" and environment["versions"]["torch"]
    assert set(environment) >= {"device", "driver", "versions", "commit", "command"}
    assert "hf_geheim" not in (run / "environment.json").read_text()


def test_goes_on_where_only_length_speed_or_place_differ(tmp_path):
    run = tmp_path / "run"
    start(run, command="first").close()
    others = dict(steps=7, threads=3, checkpoint=CheckpointConfig(every=3, keep=5), log=LogConfig(tensorboard=False))
    agents = {"a": AgentConfig(model="m", device="cpu", micro_batch_tokens=64), "b-1.7b": AgentConfig(model="n")}
    start(run, command="second", agents=agents, **others).close()
    start(Path(os.path.relpath(run)), command="third").close()
    environment = json.loads((run / "environment.json").read_text())
    assert environment["command"] == "third" and [e["command"] for e in environment["earlier"]] == ["first", "second"]
    assert load_config(run / "config.yaml").steps == 100


def test_another_config_is_refused_and_the_keys_named(tmp_path):
    run = tmp_path / "run"
    start(run).close()
    (run / "results.json").write_text("[]")
    error = refused(run, seed=3, rollout=RolloutConfig(samples=4))
    assert "seed is 0 there, 3 here" in error.what and "rollout.samples is 8 there, 4 here" in error.what
    error = refused(run, agents={"a": AgentConfig(model="m")})
    assert "agents.b-1.7b.model is 'n' there, '(not there)' here" in error.what
    (run / "results.json").write_text("[{")
    assert "not a list of results" in refused(run).what
    (run / "results.json").unlink()
    (run / "config.yaml").write_text("stepz: 3")
    assert "unknown key" in refused(run).what


def test_a_run_that_failed_before_it_did_anything_may_begin_with_other_keys(tmp_path):
    run = tmp_path / "run"
    start(run, seed=3).close()
    for folder in ("logs", "checkpoints"):
        (run / folder).mkdir()
    (run / "logs" / "a.log").write_text("an error")
    start(run).close()
    assert load_config(run / "config.yaml").seed == 0


def test_fresh_refuses_any_existing_folder(tmp_path):
    start(tmp_path / "run", fresh=True).close()
    assert "--fresh" in refused(tmp_path / "run", fresh=True).what
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", fresh=True)
    start(tmp_path / "empty").close()


def test_what_is_no_run_folder_is_refused(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("all I have")
    assert "chapter1.tex" in refused(tmp_path / "thesis").what
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path / "file").what
    with pytest.raises(UserError, match="Not a directory"):
        start(tmp_path / "file" / "below")


def test_a_start_that_was_killed_is_taken_up(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").touch()
    (run / f"{TEMPORARY}config.yaml").write_text("ste")
    start(run).close()
    assert (run / "config.yaml").exists() and not list(run.glob(f"{TEMPORARY}*"))


def test_half_a_checkpoint_is_cleaned_at_the_next_start(tmp_path):
    start(tmp_path / "run").close()
    half = tmp_path / "run" / "checkpoints" / f"{TEMPORARY}new-step_000010" / "a"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    start(tmp_path / "run").close()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from test_runfolder import start
folder = start(Path(sys.argv[1]))
print("open", flush=True)
time.sleep(60)
"""


def test_one_process_at_a_time_and_a_dead_one_frees_the_lock(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": path})
    try:
        assert holder.stdout.readline() == b"open\n"
        assert f"process {holder.pid}" in refused(tmp_path / "run").what
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with start(tmp_path / "run"):
        refused(tmp_path / "run")
    start(tmp_path / "run").close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert "can't be written" in refused(tmp_path / "run").what
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_is_said_so(tmp_path):
    small = tmp_path / "disk"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        with start(small / "run") as folder:
            write_results(small / "run", [result("base", 0.5)])
            with pytest.raises(UserError, match="the disk is full"):
                folder.write_dialogues(1, [credited(text="long " * 40_000)])
            with pytest.raises(UserError, match="the disk is full"):
                folder.write_results([result("ilr", 0.5, note="x" * 100_000)])
            assert read_results(small / "run") == [result("base", 0.5)]
            assert list((small / "run" / "dialogues").iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def credited(sample: int = 0, text: str = "the answer is “760”\n") -> Credited:
    question = Question("q-1", "Which?", "760", level=2, metadata={"numbers": [436, 760, 20]})
    said = Generation((5, 6, 7), (-0.25, -1.5, -0.000001), "stop", text)
    lost = Generation((), (), "error", "", "out of room")
    turns = (Turn("sharing", "cooperation", "user: Which?", (1, 2), said), Turn("fusion", "neutral", "", (3,), lost))
    grades = (Grade(1.1, True, True, "760"), Grade(None, False, False, None, "crashed"))
    dialogue = Dialogue(question, sample, "idea3", {"a": turns, "b": ()})
    scored = Scored(dialogue, {"a": grades, "b": ()}, {"a": (1.1, None), "b": ()})
    return Credited(scored, {"a": (1.6, None), "b": ()}, {"a": (-0.7, None), "b": ()})


def test_dialogues_come_back_as_they_were(tmp_path):
    records = [credited(0), credited(1)]
    with start(tmp_path / "run") as folder:
        folder.write_dialogues(1, records[:1])
        folder.write_dialogues(1, records)
    assert read_dialogues(tmp_path / "run", 1) == records
    lines = (tmp_path / "run" / "dialogues" / "step_000001.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    first = rows[0]["agents"]["a"][0]
    assert rows[1]["sample"] == 1 and rows[0]["answer"] == "760" and first["text"] == "the answer is “760”\n"
    assert (first["tokens"], first["reward"], first["calibrated"], first["advantage"]) == (3, 1.1, 1.6, -0.7)
    assert rows[0]["agents"]["a"][1]["reward"] is None


def test_dialogues_that_are_not_there_or_damaged(tmp_path):
    with start(tmp_path / "run") as folder:
        folder.write_dialogues(2, [credited()])
    with pytest.raises(UserError, match="no dialogues of step 3(.|\n)*steps 2 to 2"):
        read_dialogues(tmp_path / "run", 3)
    with open(tmp_path / "run" / "dialogues" / "step_000002.jsonl", "a") as file:
        file.write('{"question": 1')
    with pytest.raises(UserError, match="line 2"):
        read_dialogues(tmp_path / "run", 2)


def test_what_comes_after_the_checkpoint_is_discarded(tmp_path):
    with start(tmp_path / "run") as folder:
        for step in (1, 2, 3):
            folder.write_dialogues(step, [credited()])
        (folder.path / "failures.jsonl").write_text('{"step": 1}\n{"step": 1}\n{"step": 3}\n{"ste')
        folder.discard_after(2)
        left = sorted(p.name for p in (folder.path / "dialogues").iterdir())
        assert left == ["step_000001.jsonl", "step_000002.jsonl"]
        assert (folder.path / "failures.jsonl").read_text() == '{"step": 1}\n{"step": 1}\n'


def result(method: str, accuracy: float, **more) -> dict:
    return {"agent": "a", "method": method, "benchmark": "u", "mode": "single", "accuracy": accuracy, **more}


def test_results_replace_those_of_the_same_agent_method_benchmark_and_mode(tmp_path):
    write_results(tmp_path, [result("base", 0.1), result("base_few_shot", 0.2, examples=4)])
    write_results(tmp_path, [result("base_few_shot", 0.3, examples=8), result("base", 0.4), result("ilr", 0.5)])
    assert [(r["method"], r["accuracy"]) for r in read_results(tmp_path)] == [
        ("base", 0.4), ("base_few_shot", 0.2), ("base_few_shot", 0.3), ("ilr", 0.5)]
    (tmp_path / "results.json").write_text("[{")
    with pytest.raises(UserError, match="not a list of results"):
        write_results(tmp_path, [])


def test_fingerprint_changes_with_what_a_run_may_not_change(tmp_path):
    same = fingerprint(config(tmp_path / "x"))
    assert fingerprint(config(tmp_path / "y", steps=3, threads=1)) == same
    assert fingerprint(config(tmp_path / "x", seed=1)) != same
    assert fingerprint(config(tmp_path / "x", agents={"a": AgentConfig(model="m")})) != same
