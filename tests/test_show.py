"""Dialogues as `ilr-fast show` prints them, and its errors."""

from __future__ import annotations

import io
import json

import pytest
from made_up_runs import make_run
from rich.console import Console

from ilr_fast.errors import UserError
from ilr_fast.show import ranges, show


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one", steps=3, evaluated=False)


def printed(run, **options) -> str:
    out = io.StringIO()
    show(run, console=Console(file=out, width=200), **options)
    return out.getvalue()


def test_newest_step_by_default_with_everything_a_person_needs(run):
    text = printed(run)
    row = json.loads((run / "dialogues" / "step_000003.jsonl").read_text().splitlines()[0])
    turn = row["agents"]["gemma"][2]
    assert "step 3" in text and "step 2" not in text
    for part in (row["text"], f"expected answer: {row['answer']}", "smollm2", "gemma", "sharing", "analysis", "fusion",
                 turn["interaction"], "Peer 1 said:", f"reward {turn['reward']:.2f}",
                 f"advantage {turn['advantage']:.2f}".replace("-", "−"),
                 f"calibrated {turn['calibrated']:.2f}".replace("-", "−")):  # fmt: skip
        assert part in text


def test_turns_are_in_the_order_in_which_they_are_said(run):
    text = printed(run, step=1, question="largest-4")
    assert text.count("expected answer") == 2
    first = text[: text.index("dialogue 2")]
    heads = [(agent, stage) for stage in ("sharing", "analysis", "fusion") for agent in ("smollm2", "gemma")]
    places = [first.index(f"{agent} · {stage}") for agent, stage in heads]
    assert places == sorted(places)


def test_a_models_text_is_no_markup_and_no_terminal_command(run, tmp_path):
    row = json.loads((run / "dialogues" / "step_000001.jsonl").read_text().splitlines()[0])
    row["agents"]["gemma"][0]["text"] = "[red]x[/red] \x1b[2J\x9b31m end"
    (tmp_path / "dialogues").mkdir()
    (tmp_path / "config.yaml").write_text("steps: 1")
    (tmp_path / "dialogues" / "step_000001.jsonl").write_text(json.dumps(row) + '\n{"cut off')
    text = printed(tmp_path)
    assert "[red]x[/red]" in text and "\x1b" not in text and "\x9b" not in text


@pytest.mark.parametrize(
    "options, what, remedy",
    [
        ({"step": 9}, "no dialogues of step 9", "it has steps 1-3"),
        ({"question": "largest-4"}, "in step 3", "it was asked in step 1"),
        ({"question": "largst-13"}, "in step 3", "did you mean 'largest-13'"),
    ],
)
def test_errors_say_what_there_is(run, options, what, remedy):
    with pytest.raises(UserError) as error:
        printed(run, **options)
    assert what in error.value.what and remedy in error.value.remedy


def test_no_run_and_no_dialogues(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        printed(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run folder"):
        printed(tmp_path)
    with pytest.raises(UserError, match="no dialogues yet"):
        printed(make_run(tmp_path / "young", steps=0, evaluated=False))


def test_ranges():
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
