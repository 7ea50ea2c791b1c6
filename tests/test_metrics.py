"""Rows with every key, missing numbers null; cut back on resuming; seconds that add up; what a person sees."""

import io
import json
import resource
import signal

import pytest
from rich.console import Console

from ilr_fast.config import Config, LogConfig
from ilr_fast.errors import UserError
from ilr_fast.metrics import AGENT, PHASES, TOKENS, MetricsLog, Timer, check_trackers, complete, flatten, read_metrics
from ilr_fast.progress import Progress, duration, step_line

QUIET = Config(log=LogConfig(tensorboard=False))


def row(step: int, **agent) -> dict:
    return {"step": step, "tokens": {"generated": 30}, "agents": {"a": agent}, "seconds": {"total": 2.0}}


def write(folder, steps, **options) -> None:
    with MetricsLog(folder, QUIET, **options) as log:
        for step in steps:
            log.write(row(step, loss=step / 2))


def steps_in(folder) -> list[int]:
    return [r["step"] for r in read_metrics(folder)]


def test_a_row_has_every_key_and_null_where_there_is_no_number():
    nan = float("nan")
    whole = complete(row(3, loss=nan, lr=float("inf"), accuracy={"fusion": nan, "sharing": 0}, more=1))
    assert set(whole) == {"step", "seconds", "tokens", "agents"}
    assert set(whole["seconds"]) == {*PHASES, "other", "total"} and whole["seconds"]["swap"] is None
    assert set(whole["tokens"]) == set(TOKENS) and whole["tokens"]["dropped"] is None
    agent = whole["agents"]["a"]
    assert set(agent) == {*AGENT, "more"}
    assert agent["loss"] is None and agent["lr"] is None and agent["grad_norm"] is None
    assert agent["accuracy"] == {"fusion": None, "sharing": 0}


def test_numbers_of_tensors_become_plain():
    numpy = pytest.importorskip("numpy")
    agent = complete(row(1, loss=numpy.float32(0.5), groups=numpy.int64(3), lr=numpy.float64("nan")))["agents"]["a"]
    assert (agent["loss"], agent["groups"], agent["lr"]) == (0.5, 3, None)
    assert json.dumps(agent)


def test_flatten_leaves_out_what_is_no_number():
    flat = flatten(complete(row(1, loss=0.5, accuracy={"fusion": 0.25}, skipped="why", flag=True)))
    assert flat == {"tokens/generated": 30, "seconds/total": 2, "agents/a/loss": 0.5, "agents/a/accuracy/fusion": 0.25}


def test_resuming_cuts_rows_after_the_checkpoint_and_a_half_written_one(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "sec')
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    write(tmp_path, [], resume_step=4)
    assert steps_in(tmp_path) == [1, 2, 3, 4] and (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    write(tmp_path, [3, 4], resume_step=2)
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    write(tmp_path, [1], resume_step=0)
    assert steps_in(tmp_path) == [1]


def test_a_kill_between_checkpoint_and_row_loses_no_row(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [4], resume_step=3, last_row=row(3))
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    write(tmp_path, [5], resume_step=4, last_row=row(4))
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_a_full_disk_leaves_whole_rows(tmp_path):
    write(tmp_path, [1])
    size = (tmp_path / "metrics.jsonl").stat().st_size
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with MetricsLog(tmp_path, QUIET, resume_step=1) as log:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
            with pytest.raises(UserError, match="the disk is full"):
                log.write(row(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert steps_in(tmp_path) == [1] and (tmp_path / "metrics.jsonl").stat().st_size == size


def test_tensorboard_has_the_numbers_and_purges_on_resuming(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(steps, loss, **options):
        with MetricsLog(tmp_path, Config(), **options) as log:
            for step in steps:
                log.write(row(step, loss=loss))

    run([1, 2, 3], 0.5)
    run([3, 4], 0.25, resume_step=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("agents/a/loss")] == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25)]
    assert "agents/a/lr" not in events.Tags()["scalars"]


def test_trackers_that_are_not_installed_are_refused(monkeypatch):
    check_trackers(LogConfig(tensorboard=False))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "trackio", "tensorboard"):
        with pytest.raises(UserError) as caught:
            check_trackers(LogConfig(**{"tensorboard": False, name: True}))
        assert caught.value.where == f"log.{name}" and f"pip install {name}" in caught.value.remedy


def test_wandb_and_trackio_where_installed(tmp_path, monkeypatch):
    pytest.importorskip("wandb"), pytest.importorskip("trackio")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    with MetricsLog(tmp_path, Config(log=LogConfig(tensorboard=False, wandb=True, trackio=True))) as log:
        log.write(row(1, loss=0.5))
    assert list((tmp_path / "wandb").glob("offline-run-*"))


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_seconds_add_up_to_the_total_and_nested_ones_count_once():
    clock = Clock()
    timer = Timer(clock)
    clock.now += 1
    with timer("generate"):
        clock.now += 10
        with timer("sync"):
            clock.now += 3
        clock.now += 2
    for _ in range(2):
        with timer("train"):
            clock.now += 4
    clock.now += 0.5
    seconds = timer.seconds()
    assert (seconds["generate"], seconds["sync"], seconds["train"]) == (12, 3, 8)
    assert seconds["other"] == 1.5 and seconds["total"] == 24.5 and seconds["evaluate"] is None
    assert sum(v for k, v in seconds.items() if v is not None and k != "total") == seconds["total"]


def test_a_phase_that_fails_is_counted_and_closed():
    clock = Clock()
    timer = Timer(clock)
    with pytest.raises(KeyError), timer("train"):
        clock.now += 2
        raise KeyError
    clock.now += 1
    assert timer.seconds()["train"] == 2 and timer.seconds()["other"] == 1
    with pytest.raises(AssertionError), timer("generation"):
        pass


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    full = row(2, reward=0.42, accuracy={"sharing": 0.4, "fusion": 0.55}, validation_accuracy=0.5)
    full["seconds"]["generate"] = 3.0
    with Progress(10, Console(file=out)) as progress:
        assert not progress.live
        progress.note("going on [bold]from[/bold] step 1")
        with progress.phase("dialogues", 2) as advance:
            advance("any record")
            advance()
        progress.step(full)
    lines = out.getvalue().splitlines()
    assert lines[0] == "going on [bold]from[/bold] step 1"
    assert lines[1] == ("step 2/10  2 s  10 tok/s  a: reward 0.42, sharing 40%, fusion 55%, validation 50%  16 s left")
    assert len(lines) == 2 and "\x1b" not in out.getvalue()


def test_a_part_that_is_done_after_its_phase_was_given_up_counts_no_more():
    out = io.StringIO()
    progress = Progress(10, Console(file=out))
    with pytest.raises(UserError), progress.phase("loading", 2) as advance:
        raise UserError("one does not fit", "agents.ada", "free memory")
    advance()
    assert "loading 1/2" not in out.getvalue()


def test_a_long_phase_says_how_far_it_is(monkeypatch):
    out, now = io.StringIO(), Clock()
    monkeypatch.setattr("ilr_fast.progress.time.monotonic", now)
    progress = Progress(10, Console(file=out))
    with progress.phase("evaluate gemma", 300) as advance:
        for _ in range(100):
            now.now += 1
            advance()
    assert [line.strip() for line in out.getvalue().splitlines()] == [
        f"evaluate gemma {n}/300 …" for n in (20, 40, 60, 80, 100)
    ]


def test_live_on_a_terminal_and_not_under_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    with Progress(10, Console(file=out, force_terminal=True, width=100)) as progress:
        assert progress.live
        progress.warn("careful")
        with progress.phase("dialogues", 4) as advance:
            advance()
            progress.step(row(1, reward=0.42, accuracy={"fusion": 0.55}))
            progress._display.refresh()
    shown = out.getvalue()
    for text in ("warning: careful", "dialogues", "1/4", "1/10", "fusion", "0.42", "55%", "18 s left"):
        assert text in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Progress(10, Console(file=out, force_terminal=True)).live


def test_lines_without_numbers_show_no_zeros():
    line = step_line({"step": 1, "agents": {"a": {"reward": None}}}, 3, None)
    assert line == "step 1/3  a: reward –"
    assert [duration(s) for s in (48, 700, 3 * 3600 + 300)] == ["48 s", "12 min", "3 h 05 min"]
