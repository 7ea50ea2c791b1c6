"""The report: runs in every state, no text of a model becomes markup, numbers and comparisons are the right ones.

What a person sees and clicks is in test_report_browser.py.
"""

from __future__ import annotations

import html
import io
import json
import sys
from html.parser import HTMLParser

import pytest
import yaml
from made_up_runs import HOSTILE, make_run
from packed_parts import figures_of, spoken_of
from rich.console import Console

from ilr_fast.errors import UserError
from ilr_fast.report import report
from ilr_fast.report.arms import arms_of, differing_keys
from ilr_fast.report.bundle import library
from ilr_fast.report.compare import groups
from ilr_fast.report.export import names
from ilr_fast.report.runs import read_run, read_runs
from ilr_fast.report.texts import duration, number
from ilr_fast.report.vega import Figure


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


def grouped(paths):
    return groups(arms_of(read_runs(paths)))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "full")


def test_full_run_shows_every_section(full):
    page, printed = made([full])
    Page(page)
    for anchor in ("headline", "results", "learning", "training", "machine", "interaction", "calibration", "dialogues",
                   "failures", "setup"):  # fmt: skip
        assert f'<section id="{anchor}">' in page
    titles = [figure["title"] for figure in figures_of(page)]
    for title in ("Validation accuracy", "Accuracy: fusion", "Calibrated reward", "Share of cooperation", "Entropy",
                  "Tokens per second", "Prompts from the prefix cache", "Importance weights above the cap",
                  "Peak memory", "Seconds of a step", "Groups without a gradient",
                  "Accuracy on test", "Log-probs, trainer against engine", "Calibrated by raw reward",
                  "Right last answers · gemma"):  # fmt: skip
        assert title in titles and f"<b>{title}</b>" in page
    assert "KL to the reference" not in titles  # null in every row: no figure of zeros
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
    assert "default-src &#39;none&#39;" in page


def test_the_same_run_gives_the_same_page(full):
    assert made([full])[0] == made([full])[0]


def test_nothing_a_model_or_a_name_says_becomes_markup(tmp_path):
    run = make_run(tmp_path / '"><script>alert(3)<', agents=("<b>a", "b' onload='x"), steps=2, hostile=True)
    page, _ = made([run])
    tags = Page(page).tags
    plain = [attributes for tag, attributes in tags if tag == "script"]
    assert [a.get("id") for a in plain] == ["library", "figures", "spoken", None, None]
    assert not any(tag == "img" for tag, _ in tags)
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert html.escape(HOSTILE, quote=False)[:40] in page  # in the table of failures, as text
    assert spoken_of(page)["dialogues"][0]["agents"][0]["turns"][0]["text"] == HOSTILE  # in the packed part alone


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
    shown = page[: page.index('<script type="text/plain"')]
    assert "NaN" not in shown and ">None<" not in shown
    found = {figure["title"]: figure for figure in figures_of(page)}
    for figure in found.values():
        for row in figure["spec"]["data"]["values"]:
            assert all(v is None or v == v for v in row.values())
    reward = [row for row in found["Reward"]["spec"]["data"]["values"] if row["series"] == "gemma"]
    assert [row["x"] for row in reward] == [1, 2, 3] and reward[-1]["y"] is None  # a gap, not a zero


BROKEN = {
    "metrics.jsonl": '{"step": 3, "agents": [1, 2], "seconds": 7, "tokens": "x"}\n{"step": true}\n[]\n'
                     '{"agents": {"a": 3}}\n{"step": 4, "agents": {"gemma": {"accuracy": 2, "reward": "x"}}}',
    "dialogues/step_000002.jsonl": '{"question": 4, "agents": {"gemma": [3, {"correct": "yes", "reward": "x"}], '
                                   '"b": 7}, "error": 3}\n{"agents": {}}\n{"a',
    "interaction.json": '{"abilities": 3, "difficulty": {"gemma": [1], "smollm2": {"largest-4": "x", "largest-5": 1}}, '
                        '"windows": [2]}',
    "results.json": '[{"agent": "gemma"}, 7, {"agent": "gemma", "method": "ilr", "benchmark": "test", "mode": '
                    '"single", "n": 3, "accuracy": 0.5, "ci95": [null, 1], "samples": null, "outcomes": 9}]',
    "failures.jsonl": '{"kind": {"a": 1}, "step": [2], "question": 3}\nnull',
    "environment.json": "[1]",
    "config.yaml": "steps: many\nagents: 3\nseed: [1]",
}  # fmt: skip


@pytest.mark.parametrize("file", BROKEN)
def test_broken_files_do_not_break_the_report(tmp_path, file):
    run = make_run(tmp_path / "run", steps=3)
    (run / file).write_text(BROKEN[file])
    page, _ = made([run])
    Page(page)
    assert '<section id="results">' in page


def test_several_runs_side_by_side(tmp_path):
    runs = [make_run(tmp_path / group / "run", seed=1, method=m, steps=4, lift=0.3)
            for group, m in (("a", "ilr"), ("b", "grpo"))]  # fmt: skip
    page, _ = made(runs, out=tmp_path / "both.html")
    Page(page)
    assert not (runs[0] / "report.html").exists()
    assert "<b>a/run</b>" in page and "method_of_this_test" in page  # what differs
    titles = [figure["title"] for figure in figures_of(page)]
    assert "Reward · smollm2" in titles and "Reward" not in titles
    reward = next(f for f in figures_of(page) if f["title"] == "Reward · gemma")
    assert reward["legend"] == ["a/run", "b/run"]
    labels = [line.label for line in grouped(runs)[0].lines]
    assert labels == ["base", "base, 4 examples", "base, 8 examples", "grpo", "ilr"]


def test_seeds_are_one_curve_with_a_band_and_one_line(tmp_path):
    runs = [make_run(tmp_path / f"ilr-seed{s}", seed=s, steps=4) for s in (1, 2, 3)]
    runs.append(make_run(tmp_path / "grpo", seed=1, method="grpo", steps=4))
    page, printed = made(runs, out=tmp_path / "all.html")
    assert [arm.label for arm in arms_of(read_runs(runs))] == ["ilr", "grpo"]
    reward = next(f for f in figures_of(page) if f["title"] == "Reward · gemma")
    values = [row for row in reward["spec"]["data"]["values"] if row["series"] == "ilr"]
    columns = [dict(read_run(run).column("gemma", "reward")) for run in runs[:3]]
    for row in values:
        ys = [column[row["x"]] for column in columns]
        assert [row["y"], row["low"], row["high"]] == pytest.approx([sum(ys) / 3, min(ys), max(ys)], rel=1e-4)
    lines = {line.label: line for line in grouped(runs)[0].lines}
    assert (lines["ilr"].seeds, lines["base"].seeds, lines["grpo"].seeds) == (3, 3, 1)
    rows = [json.loads((run / "results.json").read_text()) for run in runs[:3]]
    accuracies = [r["accuracy"] for rows_ in rows for r in rows_ if (r["agent"], r["method"]) == ("smollm2", "ilr")]
    assert lines["ilr"].accuracy == pytest.approx(sum(accuracies) / 3)
    assert lines["ilr"].to["base"].n == 900 and lines["ilr"].to["base"].verdict == "better"
    assert "300, 3 seeds" in page and "300, 3 seeds" in printed


@pytest.mark.parametrize(("sources", "labels"), [
    (("p/1/train.jsonl", "p/2/train.jsonl"), ["ilr"]), (("train-seed1.jsonl", "train-seed2.jsonl"), ["ilr"]),
    (("p/3/train.jsonl", "p/4/train.jsonl"), ["ilr", "ilr"]), (("p1/train.jsonl", "p2/train.jsonl"), ["ilr", "ilr"]),
])  # fmt: skip
def test_seeds_with_data_of_their_own_are_one_curve(tmp_path, sources, labels):
    runs = [make_run(tmp_path / f"ilr-seed{s}", seed=s, steps=1) for s in (1, 2)]
    for run, source in zip(runs, sources, strict=True):
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"train": source}}))
    assert [arm.label.removesuffix("-seed1").removesuffix("-seed2") for arm in arms_of(read_runs(runs))] == labels


def test_a_difference_within_the_interval_is_none(tmp_path):
    run = make_run(tmp_path / "run", lift=0.01)
    line = {line.label: line for line in grouped([run])[0].lines}["ilr"]
    assert line.to["base"].ci95[0] < 0 < line.to["base"].ci95[1]
    page, printed = made([run])
    assert '<b class="none">none (−' in page and "none (−" in printed


def test_what_differs_between_arms(tmp_path):
    runs = [make_run(tmp_path / m, method=m, steps=1) for m in ("ilr", "grpo")]
    assert dict(differing_keys(arms_of(read_runs(runs)))) == {
        "protocol": ["idea3", "single"], "method_of_this_test": ["ilr", "grpo"]}  # fmt: skip


def test_difficulty_is_held_against_failing_levels_and_chance(tmp_path):
    run = make_run(tmp_path / "run", steps=10)
    facts = {"difficulty": {name: {f"largest-{i}": float(i) for i in range(4, 44)} for name in ("smollm2", "gemma")}}
    (run / "interaction.json").write_text(json.dumps(facts))
    for file in (run / "dialogues").iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["level"] = int(row["question"].split("-")[1])
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, _ = made([run])
    assert "+1.00 (random ±0.31)" in page  # 40 questions, 1.96/√39


def test_modes_say_who_gains_and_who_loses(tmp_path):
    run = make_run(tmp_path / "run", modes=("single", "debate", "idea3"), benchmarks=("test", "gsm8k"))
    page, printed = made([run])
    assert "who gains, who loses" in page
    for text in (page, printed):
        assert "gains +" in text and "loses " in text
    assert ">Methods and benchmarks<" in page


def test_cooperation_ratios_have_a_figure(tmp_path):
    methods = ("ilr", "ilr_ratio_0", "ilr_ratio_0.25", "ilr_ratio_1")
    page, _ = made([make_run(tmp_path / m, method=m, steps=1) for m in methods], out=tmp_path / "all.html")
    figure = next(f for f in figures_of(page) if f["title"] == "Share of cooperation: test")
    names = [row["name"] for row in figure["spec"]["data"]["values"] if row["series"] == "gemma"]
    assert sorted(names) == ["0", "0.25", "1", "dynamic"]


def test_comparisons_are_paired_and_with_the_best_few_shot_base(full):
    lines = {line.label: line for line in grouped([full])[0].lines}
    base, four, eight, ilr = (lines[k] for k in ("base", "base, 4 examples", "base, 8 examples", "ilr"))
    best = max((four, eight), key=lambda line: line.accuracy)
    assert best.best_few_shot and not (four if best is eight else eight).best_few_shot
    assert ilr.to["base"].difference == pytest.approx(ilr.accuracy - base.accuracy)
    assert ilr.to["base_few_shot"].difference == pytest.approx(ilr.accuracy - best.accuracy)
    assert "base" not in base.to and "base_few_shot" not in four.to and "base" in four.to
    assert ilr.to["base"].verdict == "better" and ilr.to["base"].n == 300


def test_a_run_without_base_takes_another_runs(tmp_path, full):
    other = make_run(tmp_path / "other", method="grpo", seed=0)
    rows = [r for r in json.loads((other / "results.json").read_text()) if r["method"] == "grpo"]
    (other / "results.json").write_text(json.dumps(rows))
    line = {line.label: line for line in grouped([full, other])[0].lines}["grpo"]
    assert line.arm == "other" and line.to["base"].n == 300 and line.to["base_few_shot"] is not None


def test_outcomes_outside_the_run_are_not_read(tmp_path, full):
    run = read_run(full)
    outside = tmp_path / "secret.jsonl"
    outside.write_text('{"agent": "gemma", "question": "1", "correct": [true]}')
    assert run.outcomes({"agent": "gemma", "outcomes": f"../{tmp_path.name}/secret.jsonl"}) == {}
    assert run.outcomes({"agent": "gemma", "outcomes": str(outside)}) == {}


def test_a_folder_of_runs_is_all_of_them(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / "ablation" / f"ilr-seed{seed}", seed=seed, steps=1)
    (tmp_path / "ablation" / "logs").mkdir()
    page, _ = made([tmp_path / "ablation"])
    assert (tmp_path / "ablation" / "report.html").read_text() == page and "300, 2 seeds" in page
    assert [run.name for run in read_runs([tmp_path / "ablation"])] == ["ilr-seed1", "ilr-seed2"]


def test_errors(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        report([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        report([tmp_path / "empty"])
    make_run(tmp_path / "one", steps=1)
    with pytest.raises(UserError, match="the same run twice"):
        report([tmp_path / "one", tmp_path / "one"])


def test_numbers_as_texts():
    assert (number(None), number(float("nan")), number(0.0, "percent")) == ("–", "–", "0.0%")
    assert (duration(581), duration(5400), duration(12.34)) == ("9 min 41 s", "1 h 30 min", "12.3 s")


def test_without_the_plotting_library_the_tables_stand(full, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    library.cache_clear()
    page, printed = made([full])
    library.cache_clear()
    for text in (page, printed):
        assert "pip install vl-convert-python" in text and "base, 4 examples" in text
    assert 'data-figure="' not in page and "No step is done yet" not in page, "no empty boxes in place of figures"
    assert '<a href="#dialogues">' in page and '<a href="#learning">' not in page


def test_every_figure_is_valid_and_drawn_without_a_browser(tmp_path):
    """Vega-Lite itself compiles and draws figures of every form; an error of a specification would raise."""
    import vl_convert

    runs = [make_run(tmp_path / f"ilr-{s}", seed=s, steps=50, agents=("a", "b")) for s in (1, 2)]
    page, _ = made([*runs, make_run(tmp_path / "grpo", method="grpo", steps=3)], out=tmp_path / "all.html")
    forms = ("Accuracy on test", "Validation accuracy · a", "Reward · a", "Log-probs, trainer against engine · a",
             "Seconds of a step · ilr", "Right last answers · a", "Calibrated by raw reward · ilr")  # fmt: skip
    drawn = [figure for figure in figures_of(page) if figure["title"] in forms]
    assert len(drawn) == len(forms)
    for figure in drawn:
        svg = vl_convert.vegalite_to_svg({**figure["spec"], "width": 300})
        assert svg.count("<path") > 3, figure["title"]


def test_figures_for_a_paper(tmp_path, full):
    made([full], out=tmp_path / "page.html", figures=tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"reward.pdf", "reward.csv", "accuracy-on-test.pdf"} <= names
    assert (tmp_path / "figures" / "reward.pdf").read_bytes().startswith(b"%PDF")
    header, first, *_ = (tmp_path / "figures" / "reward.csv").read_text().splitlines()
    row = json.loads((full / "metrics.jsonl").read_text().splitlines()[0])
    assert header == "series,step,value,raw"
    assert float(first.split(",")[2]) == pytest.approx(row["agents"]["smollm2"]["reward"], rel=1e-4)


def test_names_of_figures_files_are_their_own():
    titles = [("On a/b", "alone, 95%"), ("On a/b", "debate"), ("Reward", "x"), ("reward", ""), ("…", "")]
    found = names([Figure(title, note, {}, {}) for title, note in titles])
    assert found == ["on-a-b-alone", "on-a-b-debate", "reward", "reward-2", "figure"]
