"""The report: runs in every state, no text of a model becomes markup, numbers and comparisons are the right ones."""

from __future__ import annotations

import html
import io
import json
import re
from html.parser import HTMLParser

import pytest
from made_up_runs import HOSTILE, make_run
from rich.console import Console

from ilr_fast.errors import UserError
from ilr_fast.report import report
from ilr_fast.report.charts import Chart, Series, curves, running_mean, stacked
from ilr_fast.report.compare import groups
from ilr_fast.report.examples import changes, examples
from ilr_fast.report.interaction import pass_rates
from ilr_fast.report.runs import read_run, read_runs
from ilr_fast.report.scales import duration, log_ticks, nice_ticks, number
from ilr_fast.transcripts import Spoken, Transcript


class Page(HTMLParser):
    """Tags and attributes as a browser sees them; unclosed or crossed elements fail."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()


def made(folders, **options) -> tuple[str, str]:
    """The page and what was printed."""
    out = io.StringIO()
    path = report(folders, console=Console(file=out, width=140), **options)
    return path.read_text(encoding="utf-8"), out.getvalue()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "full")


def test_full_run_shows_every_section(full):
    page, printed = made([full])
    Page(page)
    for anchor in ("headline", "results", "learning", "training", "interaction", "dialogues", "failures", "setup"):
        assert f'<section id="{anchor}">' in page
    for title in ("Validation accuracy", "Accuracy: fusion", "Calibrated reward", "Share of cooperation", "Entropy",
                  "Tokens per second", "Peak memory", "Seconds of a step", "Groups without a gradient"):
        assert f"<b>{title}</b>" in page
    assert "KL to the reference" not in page  # null in every row: no chart of zeros
    accuracy = next(r for r in json.loads((full / "results.json").read_text()) if r["method"] == "ilr")["accuracy"]
    for text in (page, printed):
        assert f"{100 * accuracy:.1f}%" in text and "base, 4 examples" in text


def test_page_needs_no_network(full):
    page, _ = made([full])
    for tag, attributes in Page(page).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed"), tag
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "#").startswith("#")
    assert "@import" not in page and "url(" not in page
    assert "http://" not in page and "https://" not in page


def test_nothing_a_model_or_a_name_says_becomes_markup(tmp_path):
    run = make_run(tmp_path / '"><script>alert(3)<', agents=("<b>a", "b' onload='x"), steps=2, hostile=True)
    page, _ = made([run])
    tags = Page(page).tags
    assert sum(tag == "script" for tag, _ in tags) == 1 and not any(tag == "img" for tag, _ in tags)
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert html.escape(HOSTILE, quote=False)[:40] in page
    assert "alert(1)" in page  # it is shown, as text


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0, "planned": 9, "evaluated": False},
        {"steps": 1, "planned": 9, "evaluated": False},
        {"agents": ("gemma",), "stages": ("single",), "steps": 4, "planned": 9},
        {"agents": ("gemma",), "stages": ("single",), "steps": 0, "evaluated": True},
        {"agents": ("a", "b", "c"), "steps": 70, "evaluated": False},
    ],
)
def test_runs_in_every_state(tmp_path, options):
    page, printed = made([make_run(tmp_path / "run", **options)])
    Page(page)
    assert ("No step is done yet" in page) == (options["steps"] == 0)
    assert ("No evaluation yet" in page) == (not options.get("evaluated", True)) == ("no evaluation yet" in printed)
    assert ('class="badge open"' in page) == ("planned" in options)


def test_null_numbers_and_half_a_line(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    nulls = {"step": 3, "seconds": {"total": None}, "tokens": {}, "agents": {"smollm2": {"accuracy": {"sharing": None}},
             "gemma": {"reward": None, "groups": 0, "groups_dropped": 0}}}  # fmt: skip
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(nulls) + '\n{"step": 4, "sec')
    (run / "environment.json").unlink()
    (run / "interaction.json").write_text("{")
    page, _ = made([run])
    Page(page)
    assert "NaN" not in page and ">None<" not in page
    for data in re.findall(r'data-chart="([^"]*)"', page):
        for series in json.loads(html.unescape(data))["series"]:
            assert all(y is None or isinstance(y, (int, float)) for _, y in series["points"])
    rewards = next(d for d in map(json.loads, map(html.unescape, re.findall(r'data-chart="([^"]*)"', page)))
                   if d["series"][1]["points"][-1] == [3, None])  # fmt: skip
    assert rewards["series"][1]["label"] == "gemma"


def test_several_runs_side_by_side(tmp_path):
    runs = [make_run(tmp_path / group / "run", seed=i, method=m, steps=4, lift=0.3)
            for i, (group, m) in enumerate([("a", "ilr"), ("b", "grpo")])]  # fmt: skip
    page, _ = made(runs, out=tmp_path / "both.html")
    Page(page)
    assert "a/run · smollm2" in page and "b/run · gemma" in page
    assert not (runs[0] / "report.html").exists()
    methods = [line.method for line in groups(read_runs(runs))[0].lines]
    assert methods == ["base"] * 2 + ["base_few_shot"] * 4 + ["grpo", "ilr"]


def test_comparisons_are_paired_and_with_the_best_few_shot_base(full):
    run = read_run(full)
    group = groups([run])[0]
    lines = {line.label: line for line in group.lines}
    base, four, eight, ilr = (lines[k] for k in ("base", "base, 4 examples", "base, 8 examples", "ilr"))
    best = max((four, eight), key=lambda line: line.accuracy)
    assert best.best_few_shot and not (four if best is eight else eight).best_few_shot
    assert ilr.to_base.difference == pytest.approx(ilr.accuracy - base.accuracy)
    assert ilr.to_few_shot.difference == pytest.approx(ilr.accuracy - best.accuracy)
    assert base.to_base is None and four.to_few_shot is None and four.to_base is not None
    assert ilr.to_base.beats and ilr.to_base.n == 300


def test_a_run_without_base_takes_another_runs(tmp_path, full):
    other = make_run(tmp_path / "other", method="grpo", seed=0)
    rows = [r for r in json.loads((other / "results.json").read_text()) if r["method"] == "grpo"]
    (other / "results.json").write_text(json.dumps(rows))
    line = groups(read_runs([full, other]))[0].lines[-2]
    assert line.method == "grpo" and line.run == "other"
    assert line.to_base.n == 300 and line.to_few_shot is not None


def test_outcomes_outside_the_run_are_not_read(tmp_path, full):
    run = read_run(full)
    outside = tmp_path / "secret.jsonl"
    outside.write_text('{"agent": "gemma", "question": "1", "correct": [true]}')
    assert run.outcomes({"agent": "gemma", "outcomes": f"../{tmp_path.name}/secret.jsonl"}) == {}
    assert run.outcomes({"agent": "gemma", "outcomes": str(outside)}) == {}


def test_errors(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        report([tmp_path / "nowhere"])
    make_run(tmp_path / "one", steps=1)
    with pytest.raises(UserError) as error:
        report([tmp_path])
    assert "one" in error.value.remedy
    with pytest.raises(UserError, match="the same run twice"):
        report([tmp_path / "one", tmp_path / "one"])


def spoken(stage, correct, interaction="cooperation"):
    return Spoken(stage, interaction, "", "x", "stop", 1, "1", correct, 1.0, 1.0, 0.0)


def transcript(number, *answers):
    agents = {f"a{i}": [spoken("sharing", first), spoken("fusion", last)] for i, (first, last) in enumerate(answers)}
    return Transcript(1, f"q{number}", "?", "1", 0, "idea3", agents)


def test_examples_are_of_each_kind_and_never_the_same_twice():
    transcripts = [
        transcript(0, (True, True), (True, True)),
        transcript(1, (False, True), (True, True)),
        transcript(2, (True, False), (True, True)),
        transcript(3, (True, True), (False, False)),
    ]
    found = {e.title: e.transcript.question_id for e in examples(transcripts)}
    assert list(found.values()) == ["q1", "q3", "q0", "q2"]
    assert [c for c in changes(transcripts) if c.agent == "a0"][0].mended == 1
    counted = changes(transcripts)[0]
    assert (counted.n, counted.both_right, counted.mended, counted.spoiled, counted.both_wrong) == (4, 2, 1, 1, 0)
    assert len(examples([transcript(5, (False, False))])) == 1 and examples([]) == []
    assert pass_rates([transcript(1, (True, True)), transcript(1, (False, True))], "a0") == {"q1": 0.5}


def test_lines_break_where_numbers_do_not_exist():
    points = [(1, 0.2), (2, None), (3, 0.4), (4, 0.5)]
    svg = str(curves(Chart("t", "plain", [Series("s", 0, points)])))
    path = re.search(r'<path d="([^"]*)"', svg).group(1)
    assert path.count("M") == 2 and path.count("L") == 1
    assert svg.count("<circle") == 1  # the point that stands alone
    joined = str(curves(Chart("t", "plain", [Series("s", 0, points, sparse=True)])))
    assert re.search(r'<path d="([^"]*)"', joined).group(1).count("M") == 1
    assert curves(Chart("t", "plain", [Series("s", 0, [(1, None)])])) == ""
    assert running_mean([(1, 2.0), (2, None), (3, 4.0), (4, 6.0)], 2) == [(1, 2.0), (2, None), (3, 3.0), (4, 5.0)]


def test_curves_are_drawn_to_scale():
    svg = str(curves(Chart("t", "plain", [Series("s", 0, [(1, 0.0), (3, 1.0)])], low=0.0, high=1.0)))
    assert re.search(r'<path d="([^"]*)"', svg).group(1) == "M46.0 184.0L370.0 8.0"


def test_stacked_bars_add_up_and_long_runs_are_averaged():
    a = Series("a", 0, [(s, 2.0) for s in range(1, 601)])
    b = Series("b", 1, [(s, 1.0) for s in range(1, 601)])
    svg = str(stacked(Chart("t", "seconds", [a, b])))
    heights = [float(h) for h in re.findall(r'<rect[^>]*height="([\d.]+)"', svg)]
    assert len(heights) == 120 and heights[0] == pytest.approx(2 * heights[1], abs=0.2)


def test_scales():
    assert nice_ticks(0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] and nice_ticks(3, 3) == [3]
    assert log_ticks(2e-6, 5e-5) == [2e-6, 5e-6, 1e-5, 2e-5, 5e-5]
    assert (number(None), number(float("nan")), number(0.0, "percent")) == ("–", "–", "0.0%")
    assert (duration(581), duration(5400), duration(12.34)) == ("9 min 41 s", "1 h 30 min", "12.3 s")


def test_many_runs_have_charts_by_agent_and_a_colour_a_run(tmp_path):
    runs = [make_run(tmp_path / m, seed=i, method=m, steps=3, evaluated=False) for i, m in enumerate(("x", "y", "z"))]
    page, _ = made(runs, out=tmp_path / "all.html")
    assert "<b>Reward · smollm2</b>" in page and "<b>Reward · gemma</b>" in page and "<b>Reward</b>" not in page
    data = [json.loads(html.unescape(d)) for d in re.findall(r'data-chart="([^"]*)"', page)]
    by_agent = [d["series"] for d in data if [s["label"] for s in d["series"]] == ["x", "y", "z"]]
    assert len(by_agent) > 10 and len({tuple(s["stroke"] for s in series) for series in by_agent}) == 1
