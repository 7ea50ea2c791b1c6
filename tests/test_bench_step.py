"""`ilr-fast bench step` and `trl_step`: TRL's settings have their rows as they end, whatever becomes of the others."""

import pytest

trl_step = pytest.importorskip("ilr_benchmarks.trl_step")

FIRST, SECOND = ({"micro_batch": size, "checkpointing": False} for size in (3, 2))


def lines(setting, *seconds):
    yield from ({"setting": setting, "step": i, "seconds": s, "memory_gib": 1.0} for i, s in enumerate(seconds, 1))


def rows(monkeypatch, *told):
    monkeypatch.setattr(trl_step, "case_lines", lambda *_: iter(told))
    monkeypatch.setattr(trl_step.importlib.util, "find_spec", lambda name: name)
    return trl_step.trl_rows(trl_step.SMALL, True)


def test_a_setting_s_row_comes_when_it_ends_and_its_second_step_counts(monkeypatch):
    first = next(rows(monkeypatch, *lines(FIRST, 9.0, 2.0), {"setting": FIRST, "ended": 11.0}, *lines(SECOND, 8.0)))
    assert (first["ms"], first["first_ms"], first["memory_gib"]) == (2e3, 9e3, 1.0)
    assert "micro_batch 3" in first["variant"]


def test_a_setting_that_fails_and_a_process_that_ends_are_told(monkeypatch):
    failed = {"setting": FIRST, "failed": "out of memory"}, {"setting": FIRST, "ended": 1.0}
    found = list(rows(monkeypatch, *failed, *lines(SECOND, 8.0), {"failed": "exit status -9"}))
    assert [(row["ms"], row["status"]) for row in found] == [(None, "out of memory"), (None, "exit status -9")]
