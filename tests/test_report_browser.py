"""The report in a headless Chromium: everything is drawn, filtered, saved, on a desktop and a phone, light and dark;
nothing is asked of a network, and nothing that a model said is run."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil

import pytest
from made_up_runs import HOSTILE, make_run
from rich.console import Console

from ilr_fast.report import report
from ilr_fast.report.theme import DARK, LIGHT

pytestmark = pytest.mark.browser
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    """Chromium, as the system has it; skipped where it is missing, but not on CI, which installs it (.ci/run)."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        missing = "no Chromium on this machine (apt-get install chromium)"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing (pip install playwright)")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """open(path, **context) → the page. At the end `open.heard` is empty: no error, no dialog, no request."""
    contexts, heard = [], []

    def open_(path, **options):
        context = browser.new_context(accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: (heard.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:", "blob:"))
                else heard.append(f"request {request.url}"))  # fmt: skip
        page.goto(f"file://{path}")
        return page

    open_.heard = heard
    yield open_
    for context in contexts:
        context.close()
    assert heard == []


def written(folders, out, **options):
    return report(folders, out=out, console=Console(file=io.StringIO()), **options)


def draw_all(page) -> int:
    """Opens what is folded and scrolls through the page; how many figures were drawn."""
    page.evaluate("document.querySelectorAll('details.plain').forEach(details => { details.open = true; })")
    for figure in page.query_selector_all(".chart"):
        figure.scroll_into_view_if_needed()
        figure.wait_for_selector(".plot svg")
    return len(page.query_selector_all(".plot svg"))


def saved(page, figure, kind) -> bytes:
    with page.expect_download() as download:
        figure.query_selector(f'[data-export="{kind}"]').click()
    with open(download.value.path(), "rb") as file:
        return file.read()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", steps=30, words=20, modes=("single", "debate"))


@pytest.fixture(scope="module")
def path(run):
    return written([run], run / "report.html")


def figure_called(page, title):
    return page.query_selector(f'.chart:has(figcaption b:text-is("{title}"))')


def test_all_figures_are_drawn_and_tell_their_values(opened, path):
    page = opened(path)
    assert draw_all(page) == len(page.query_selector_all("[data-figure]")) > 15
    plot = figure_called(page, "Reward").query_selector(".plot svg")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.wait_for_selector("#vg-tooltip-element.visible")
    assert {"step", "smollm2", "gemma"} <= set(tip.inner_text().replace("\t", "\n").split("\n"))


def test_figures_are_saved(opened, path, run):
    page = opened(path, color_scheme="dark")
    figure = figure_called(page, "Reward")
    assert saved(page, figure, "PNG").startswith(b"\x89PNG")
    svg = saved(page, figure, "SVG").decode()
    assert svg.startswith("<svg") and "gemma" in svg and "step" in svg
    assert LIGHT[0] in svg and DARK[0] not in svg  # for paper, though the page is dark
    rows = list(csv.DictReader(io.StringIO(saved(page, figure, "CSV").decode())))
    metrics = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    wanted = [row["agents"]["gemma"]["reward"] for row in metrics]
    assert [float(row["value"]) for row in rows if row["series"] == "gemma"] == pytest.approx(wanted, rel=1e-4)


def test_light_and_dark(opened, path):
    page = opened(path, color_scheme="dark")

    def colours():
        page.wait_for_timeout(400)
        line = page.query_selector(".plot svg path[stroke]:not([stroke='transparent'])")
        return page.evaluate("getComputedStyle(document.body).backgroundColor"), line.get_attribute("stroke")

    figure_called(page, "Reward").scroll_into_view_if_needed()
    page.wait_for_selector(".plot svg")
    dark = colours()
    page.click("#theme")
    light = colours()
    assert dark[0] == "rgb(15, 15, 14)" and light[0] == "rgb(247, 247, 244)" and dark[1] != light[1]


def test_a_phone_shows_all_without_scrolling_sideways(opened, path):
    page = opened(path, viewport=PHONE, is_mobile=True, has_touch=True)
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    wide = page.evaluate("plots.filter(p => p.querySelector('svg').clientWidth > p.clientWidth + 1).length")
    assert wide == 0
    page.tap("#list summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_dialogues_are_filtered_and_read(opened, path):
    page = opened(path)
    page.wait_for_selector("#list details")
    everything = int(page.inner_text("#found").split()[0])
    assert len(page.query_selector_all("#list > details")) == 20
    page.click("#more")
    assert len(page.query_selector_all("#list > details")) == min(40, everything)

    def chosen(**filters):
        for name in ("agent", "stage", "mode", "answer", "change"):
            page.select_option(f"select[name={name}]", filters.get(name, ""))
        return int(page.inner_text("#found").split()[0])

    counts = {change: chosen(change=change, agent="gemma") for change in
              ("mended by a peer", "spoiled by a peer", "mended alone", "spoiled alone", "kept right", "kept wrong")}
    assert sum(counts.values()) == everything and counts["mended by a peer"] > 0  # fmt: skip
    right, wrong = (chosen(agent="gemma", stage="fusion", answer=answer) for answer in ("right", "wrong"))
    assert right + wrong == everything and right and wrong
    both = [chosen(agent="gemma", stage="fusion", mode=mode) for mode in ("cooperation", "competition")]
    assert sum(both) == everything and all(both)

    assert chosen(agent="gemma", change="mended by a peer") == counts["mended by a peer"]
    page.click("#list summary")
    head = page.query_selector("#list details[open] summary")
    assert "mended by a peer" in head.inner_text() and "Which number is the largest" in head.inner_text()
    marks = head.query_selector_all('.chip:has-text("gemma") em')
    assert [m.inner_text() for m in (marks[0], marks[-1])] == ["✗", "✓"]  # gemma's first and last answer
    box = page.query_selector("#list details[open]")
    assert [h.inner_text().lower() for h in box.query_selector_all("h4")] == ["sharing", "analysis", "fusion"]
    assert len(box.query_selector_all("article")) == 6 and "reward" in box.inner_text()
    box.query_selector("article details summary").click()
    assert "Which number is the largest" in box.query_selector("article details pre").inner_text()
    page.fill("input[name=words]", "no dialogue says this")
    assert page.inner_text("#found").startswith("0 of")


def test_nothing_that_was_said_is_run(opened, tmp_path):
    names = ("<img src=x onerror=alert(1)>", "b' onload='alert(2)")
    run = make_run(tmp_path / "run", agents=names, steps=3, hostile=True)
    page = opened(written([run], run / "report.html"))
    draw_all(page)
    page.click("#list summary")
    assert page.query_selector("#list article pre").inner_text() == HOSTILE
    assert page.query_selector("img") is None
    assert opened.heard == []
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert page.evaluate("window.ran") is None and "Content Security Policy" in opened.heard.pop()


def test_several_runs_are_filtered_by_run(opened, tmp_path):
    runs = [make_run(tmp_path / f"{m}-seed{s}", method=m, seed=s, steps=5) for m in ("ilr", "ilr_di") for s in (1, 2)]
    page = opened(written(runs, tmp_path / "all.html"))
    draw_all(page)
    page.select_option("select[name=run]", "ilr_di-seed2")
    shown = int(page.inner_text("#found").split()[0])
    assert 0 < shown < int(page.inner_text("#found").split()[2])
    assert all("ilr_di-seed2" in s.inner_text() for s in page.query_selector_all("#list summary b"))


def test_a_thousand_steps_stay_below_five_megabytes(opened, tmp_path):
    run = make_run(tmp_path / "run", steps=1000, words=250, dialogues=2)
    path = written([run], run / "report.html")
    assert path.stat().st_size < 5e6
    page = opened(path)
    page.wait_for_selector("#list details")
    figure_called(page, "Reward").scroll_into_view_if_needed()
    page.wait_for_selector(".plot svg")
    assert int(page.inner_text("#found").split()[0]) > 100
