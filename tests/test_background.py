"""Work beside the main thread, and checkpoints that are written beside the next step."""

from __future__ import annotations

import threading

import pytest
from end_to_end import save_models, write_config

from ilr_fast import checkpoint
from ilr_fast import train as training
from ilr_fast.background import Background
from ilr_fast.cli import main
from ilr_fast.errors import UserError
from ilr_fast.metrics import read_metrics


def test_a_failure_is_raised_where_it_is_waited_for_once():
    background, done = Background("test"), []
    background.start(lambda: done.append(1))
    background.start(lambda: 1 / 0)  # waits for the first
    assert done == [1] and background.busy
    with pytest.raises(ZeroDivisionError):
        background.wait()
    background.wait()
    background.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.start(lambda: done.append(2))  # runs all the same
    background.wait()
    assert done == [1, 2]
    background.start(lambda: 1 / 0)
    background.close()
    assert not background.busy


def test_what_an_interrupt_did_not_wait_for_is_still_told(monkeypatch):
    def interrupted(works):
        raise KeyboardInterrupt

    background = Background("test")
    background.start(lambda: 1 / 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ilr_fast.background.wait", interrupted)
        background.wait()
    with pytest.raises(ZeroDivisionError):
        background.wait()


def test_a_mark_is_waited_for_and_a_failure_before_or_after_it_is_raised():
    background, mark, go = Background("test"), threading.Event(), threading.Event()
    background.start(lambda: (mark.set(), go.wait(60), 1 / 0))
    background.reached(mark)
    assert background.busy
    go.set()
    with pytest.raises(ZeroDivisionError):
        background.wait()
    background.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.reached(threading.Event())
    background.reached(threading.Event())  # nothing is left to wait for


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def test_a_checkpoint_is_written_while_the_next_dialogues_are_sampled(tmp_path, models, monkeypatch):
    save, roll_out, update = training.save, training.roll_out, training.update
    sampling, updates, threads = threading.Event(), [], []

    def slow(*arguments, **more):
        threads.append(threading.current_thread())
        if len(updates) == 1:  # the first step's: it may not end before the second step's dialogues have begun
            assert sampling.wait(60)
        assert len(updates) == len(threads), "weights changed while they were to be written"
        return save(*arguments, **more)

    def begins(session, interactions, questions, step, timer):
        if step == 2:
            sampling.set()
        return roll_out(session, interactions, questions, step, timer)

    def counted(session, credited, step, timer, meanwhile):
        updates.append(step)
        return update(session, credited, step, timer, meanwhile)

    for name, new in (("save", slow), ("roll_out", begins), ("update", counted)):
        monkeypatch.setattr(training, name, new)
    assert main(["train", str(write_config(tmp_path, models, steps=3, checkpoint__every=1))]) == 0
    assert len(threads) == 3 and all(t is not threading.main_thread() for t in threads)
    first, second, _ = (row["seconds"] for row in read_metrics(tmp_path / "run"))
    assert first["checkpoint"] < 1 and second["checkpoint"] is not None


def test_an_update_waits_for_weights_in_files_and_not_for_hashes(tmp_path, models, monkeypatch):
    save, update, facts = training.save, training.update, checkpoint._facts
    updates, updating, seen = [], threading.Event(), []

    def read(*arguments, on_read, **more):
        before = len(updates)
        if before == 1:
            updating.wait(1)  # an update that does not wait comes here

        def told():
            seen.append(len(updates) - before)
            on_read()

        return save(*arguments, on_read=told, **more)

    def hashed(folder, files):
        if len(updates) == 1:  # the first checkpoint's hashes wait for the second update
            assert updating.wait(60)
        return facts(folder, files)

    def counted(session, credited, step, timer, meanwhile):
        updates.append(step)
        if step == 2:
            updating.set()
        return update(session, credited, step, timer, meanwhile)

    monkeypatch.setattr(training, "save", read)
    monkeypatch.setattr(training, "update", counted)
    monkeypatch.setattr(checkpoint, "_facts", hashed)
    assert main(["train", str(write_config(tmp_path, models, steps=2, checkpoint__every=1))]) == 0
    assert updating.is_set() and seen == [0, 0], "an update came before its turn"
    assert checkpoint.newest_good(tmp_path / "run" / "checkpoints").step == 2


def test_a_checkpoint_that_fails_ends_the_run(tmp_path, models, monkeypatch, capfd):
    def full(*arguments, **more):
        raise UserError("the disk is full", "checkpoints", "free some space")

    monkeypatch.setattr(training, "save", full)
    assert main(["train", str(write_config(tmp_path, models, steps=2, checkpoint__every=1))]) == 2
    assert "the disk is full" in capfd.readouterr().err


def test_a_row_that_was_not_made_belongs_to_no_checkpoint(tmp_path, models, monkeypatch):
    row = training.metrics_row

    def interrupted(step, *arguments):
        if step == 2:
            raise KeyboardInterrupt
        return row(step, *arguments)

    monkeypatch.setattr(training, "metrics_row", interrupted)
    assert main(["train", str(write_config(tmp_path, models, steps=2, checkpoint__every=1))]) == 130
    found = checkpoint.newest_good(tmp_path / "run" / "checkpoints")
    assert found.step == found.state["row"]["step"] == 1


def test_the_cards_memory_is_looked_at_before_kernels_are_compiled_there(tmp_path, models, monkeypatch):
    seen = []

    class Looks(training.PeakSampler):
        def __init__(self):
            seen.append("card")
            super().__init__()

    def ahead(*arguments, **more):
        seen.append("kernels")
        raise UserError("enough seen", "this", "nothing")

    monkeypatch.setattr(training, "PeakSampler", Looks)
    monkeypatch.setattr(training, "kernels_ahead", ahead)
    assert main(["train", str(write_config(tmp_path, models, steps=1))]) == 2
    assert seen == ["card", "kernels"]
