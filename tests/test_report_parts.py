"""What the report counts and draws, part by part, on cases small enough to check by hand."""

from __future__ import annotations

import json

import pytest
import yaml
from made_up_runs import make_run

from ilr_fast.report.arms import arms_of
from ilr_fast.report.bundle import packed
from ilr_fast.report.calibration import CalibrationTally
from ilr_fast.report.compare import groups
from ilr_fast.report.flips import FlipTally, flip
from ilr_fast.report.keep import KINDS, Keeper, cut, kind_of
from ilr_fast.report.runs import read_run
from ilr_fast.report.series import Series, placed, running_mean
from ilr_fast.report.stances import StanceTally
from ilr_fast.report.survey import survey
from ilr_fast.report.vega import Axis, curves, stacked
from ilr_fast.statistics import mean_interval
from ilr_fast.transcripts import Spoken, Transcript, _without_tokens, read_transcripts


def spoken(stage, correct, *, mode="cooperation", reward=1.0, calibrated=1.0):
    return Spoken(stage, mode, "", "x", "stop", 1, "1", correct, reward, calibrated, 0.0)


def transcript(number, *answers, step=1, error=None, level=None):
    """Each agent's verdicts in order."""
    agents = {f"a{i}": [spoken(f"stage {j}", c) for j, c in enumerate(said)] for i, said in enumerate(answers)}
    return Transcript(step, f"q{number}", "?", "1", 0, "idea3", agents, error, level)


@pytest.mark.parametrize(
    ("own", "peer", "wanted"),
    [
        ((True, True, True), (False, False, False), "kept right"),
        ((False, True, False), (True, True, True), "kept wrong"),
        ((False, False, True), (False, True, False), "mended by a peer"),
        ((False, False, True), (False, False, True), "mended alone"),  # the peer was right too late
        ((True, True, False), (True, False, True), "spoiled by a peer"),
        ((True, True, False), (True, True, False), "spoiled alone"),
        ((True,), (False,), None),
        ((None, True), (False, True), None),
    ],
)
def test_what_became_of_the_first_answer(own, peer, wanted):
    assert flip(transcript(0, own, peer), "a0") == wanted


def test_flips_are_counted_by_agent_and_add_up():
    one, two = FlipTally(), FlipTally()
    one.add(transcript(0, (False, True), (True, True)))
    two.add(transcript(1, (True, False), (True, True)))
    both = one + two
    assert both.counts["a0"] == {"mended by a peer": 1, "spoiled alone": 1} and both.counts["a1"] == {"kept right": 2}


def test_each_dialogue_is_of_the_rarest_kind_that_fits():
    cases = {
        "spoiled by a peer": transcript(0, (True, False), (False, True)),
        "mended by a peer": transcript(0, (False, True), (True, True)),
        "spoiled": transcript(0, (True, False), (True, True)),
        "mended": transcript(0, (False, True), (False, False)),
        "broken off": transcript(0, (True,), error="no room"),
        "mixed": transcript(0, (True, True), (False, False)),
        "all wrong": transcript(0, (False, False), (False, False)),
        "all right": transcript(0, (True, True), (True, True)),
    }
    assert {kind: kind_of(t) for kind, t in cases.items()} == {kind: kind for kind in KINDS}


def test_what_is_kept_is_spread_over_the_run_and_does_not_depend_on_order():
    said = [transcript(i, (True, True), (True, i % 50 > 0), step=s) for s in range(1, 101) for i in range(20)]

    def kept(transcripts):
        keeper = Keeper(range(1, 101), quota=3)
        for t in transcripts:
            keeper.add(t)
        assert keeper.seen.total() == 2000
        return [(t.step, t.question_id) for t in keeper.kept()]

    forwards = kept(said)
    assert forwards == kept(said[::-1])
    assert len(forwards) == 10 * 2 * 3  # tenths, kinds, quota
    assert {(step - 1) // 10 for step, _ in forwards[:10]} == set(range(10))  # the first of every tenth come first
    assert sum(question == "q0" for _, question in forwards) == 30  # one in twenty is spoiled, half of what is kept
    assert cut("a" * 10) == "a" * 10 and "96 characters left out" in cut("b" * 100, 4)


def test_stances_by_fifths_of_difficulty_and_by_level():
    known = {f"q{i}": float(i) for i in range(10)}
    tally = StanceTally({"a0": known})
    for i in range(10):
        tally.add(transcript(i, (i < 5, True), (True, True), level=4))
    assert tally.bins == ["easiest", "easier", "middle", "harder", "hardest", "level 4"]
    firsts = {b: (tally.right["a0", "cooperation", b, "first"], tally.n["a0", "cooperation", b, "first"])
              for b in tally.bins[:5]}  # fmt: skip
    assert firsts == {"easiest": (2, 2), "easier": (2, 2), "middle": (1, 2), "harder": (0, 2), "hardest": (0, 2)}
    assert tally.n["a1", "cooperation", "level 4", "last"] == 10


def test_calibration_by_reward_and_groups_of_two_values():
    tally = CalibrationTally()
    for sample, (raw, calibrated) in enumerate([(0.0, -0.2), (1.0, 1.5), (1.0, 1.3), (0.0, 0.2)]):
        turns = [spoken("s", True, reward=raw, calibrated=calibrated), spoken("t", True, reward=raw + sample / 10)]
        tally.add(Transcript(1, "q", "?", "1", sample, "idea3", {"a": turns}))
    tally.end_step()
    assert tally.groups == {"two": 1, "more": 1} and not tally.is_off()
    zero, *_, last = tally.by_reward("a")
    assert zero[:2] == (0.0, 3) and last[0] == pytest.approx(1.2)
    assert tally.by_reward("nobody") == []


def test_token_lists_are_passed_over_and_texts_with_their_marks_are_not(tmp_path):
    run = make_run(tmp_path / "run", steps=1, dialogues=2, words=3)
    file = run / "dialogues" / "step_000001.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    trap = 'he said , "prompt_ids": [1, 2], "token_ids": [3]} and went'
    rows[0]["agents"]["gemma"][1]["text"] = trap
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = _without_tokens(file.read_bytes().splitlines()[0])
    assert set(rows[0]) == set(json.loads(short)) and b'"token_ids": [12345' not in short and len(short) < 4000
    read = read_transcripts(run, 1)
    assert read[0].agents["gemma"][1].text == trap and len(read) == len(rows)
    assert [s.text for s in read[1].agents["smollm2"]] == [t["text"] for t in rows[1]["agents"]["smollm2"]]


def test_much_is_read_in_part_spread_evenly(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=40, dialogues=2))
    whole = survey(run, {}, quota=5)
    assert (len(whole.steps), whole.steps_there, whole.dialogues) == (40, 40, 80)
    size = sum(f.stat().st_size for f in (run.path / "dialogues").iterdir())
    part = survey(run, {}, quota=5, most=size // 3)
    assert list(part.steps) == list(range(1, 41, 4)) and part.dialogues == 20


def test_curves_are_means_with_bands_and_gaps():
    runs = [[(1, 0.0), (2, 1.0), (3, None)], [(1, 1.0), (2, 2.0), (3, None)], [(1, 2.0), (2, 3.0), (3, None)]]
    rows = Series("s", runs).rows(placed([1, 2, 3]))
    assert [row["y"] for row in rows] == [1.0, 2.0, None]
    assert (rows[0]["low"], rows[0]["high"], rows[0]["raw"]) == (0.0, 2.0, None), "of few runs their range"
    five = Series("s", [[(1, y)] for y in (0.0, 1.0, 2.0, 3.0, 4.0)]).rows(placed([1]))
    assert five[0]["low"] == pytest.approx(2 - 2.776 * 2.5**0.5 / 5**0.5, rel=1e-3)
    one = Series("s", runs[:1]).rows(placed([1, 2, 3]))
    assert [(row["y"], row["raw"]) for row in one] == [(0.0, 0.0), (1.0, 1.0), (None, None)] and one[0]["low"] is None
    sparse = Series("s", runs[:1], sparse=True).rows(placed([1, 2, 3]))
    assert [row["x"] for row in sparse] == [1, 2]
    assert running_mean([(1, 2.0), (2, None), (3, 4.0), (4, 6.0)], 2) == [(1, 2.0), (2, None), (3, 3.0), (4, 5.0)]
    assert mean_interval([1.0, 3.0]) == (1.0, 3.0)


def test_long_runs_are_drawn_as_means_of_neighbours():
    column = [(step, float(step % 2)) for step in range(1, 1001)]
    rows = Series("s", [column]).rows(placed([x for x, _ in column]))
    assert len(rows) == 200 and all(row["raw"] == pytest.approx(0.5, abs=0.11) for row in rows)


def test_figures_without_numbers_are_not_drawn():
    empty = Series("s", [[(1, None)]])
    assert curves("t", "", Axis("y", "plain"), [empty], ["s"]) is None
    assert stacked("t", "", Axis("y", "seconds"), [empty]) is None


def test_stacked_bars_stand_on_one_another():
    a, b = (Series(name, [[(s, y) for s in range(1, 601)]]) for name, y in (("a", 2.0), ("b", 1.0)))
    values = stacked("t", "", Axis("y", "seconds"), [a, b]).spec["data"]["values"]
    assert len(values) == 120 and values[0]["right"] <= values[1]["left"]
    assert {(v["series"], v["from"], v["to"]) for v in values} == {("a", 0.0, 2.0), ("b", 2.0, 3.0)}


def test_packed_is_the_same_every_time():
    assert packed({"a": [1, "é"]}) == packed({"a": [1, "é"]}) and "<" not in packed("</script>")


def test_a_frozen_peer_is_no_result_of_the_method(tmp_path):
    run = make_run(tmp_path / "peer", method="grpo_peer", steps=2)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["agents"]["gemma"]["train"] = "none"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    methods = {group.agent: {line.method for line in group.lines} for group in groups(arms_of([read_run(run)]))}
    assert "grpo_peer" in methods["smollm2"] and methods["gemma"] <= {"base", "base_few_shot"}
