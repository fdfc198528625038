"""The report as a person sees it: in a real browser, on a desk and on a phone, with no network."""

from __future__ import annotations

import io
import json
import shutil

import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

from contextlab.report import build_report, write_cost_figure
from contextlab.report.packing import unpacked
from contextlab.report.page_data import PageData, first_sentences, folded
from tests.evaluation.test_results import rows as cost_rows
from tests.report.conftest import MODELS, RUN, make_records, make_results

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    return build_report(make_results(), make_records(), [RUN], [{"name": "demo", "seeds": [0]}], path)


def opened(browser, path, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(120_000)  # where all cores are taken a page of figures loads for longer than 30 s
    page.problems, page.requests = [], []
    page.on("console", lambda m: page.problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.problems.append(str(e)))
    page.on("request", lambda r: page.requests.append(r.url))
    page.goto(path.as_uri())
    page.wait_for_function("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
    return page


@pytest.fixture(scope="module")
def desk(browser, report):
    """The report on a wide screen, for tests that look at it and use what is on it; it loads for seconds."""
    page = opened(browser, report, 1280)
    yield page
    page.close()


@pytest.fixture(scope="module")
def phone(browser, report):
    page = opened(browser, report, 390)
    yield page
    page.close()


@pytest.mark.parametrize("screen", ["desk", "phone"])
def test_figures_are_drawn_and_nothing_is_asked_of_the_network(request, screen, tmp_path):
    page = request.getfixturevalue(screen)
    width = page.viewport_size["width"]
    assert page.locator("figure[data-figure]").count() == 10
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # The answer first: three sentences and a figure before anyone scrolls.
    assert page.locator(".answer li").count() == 3
    box = page.locator(".answer figure").bounding_box()
    assert box["y"] + page.locator(".answer .plot .cartesianlayer").bounding_box()["height"] <= 900
    # Tables that are wider than the page say so; none does on a desk.
    hints = page.eval_on_selector_all(".hint", "h => h.map(x => getComputedStyle(x).display)")
    wider = page.eval_on_selector_all(".scroll", "s => s.map(x => x.scrollWidth - x.clientWidth > 2)")
    assert [hint == "block" for hint in hints] == wider
    assert any(wider) == (width == 390)
    names = page.eval_on_selector_all(".numbers td:first-child", "c => c.map(x => [x.clientWidth, x.clientHeight])")
    assert all(across > 100 and high < 80 for across, high in names)
    page.screenshot(path=str(tmp_path / f"report-{width}.png"), full_page=True)


def test_figures_that_a_browser_cannot_unpack_leave_the_tables_and_a_line(browser, report, tmp_path):
    deflated = tmp_path / "deflated.html"  # as by a Python that was built without LZMA
    deflated.write_text(report.read_text().replace('data-form="lzma"', 'data-form="deflate"'))
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(deflated.as_uri())
    page.wait_for_function("document.querySelector('.plot').textContent")
    assert "cannot unpack the figures" in page.locator(".plot").first.inner_text()
    assert page.locator("table.numbers td").count() > 20
    page.close()


def test_the_page_holds_all_results(report, results):
    packed = unpacked(report.read_text())
    assert packed["plotly"] == get_plotlyjs()
    data = json.loads(packed["page"])
    found = pd.read_csv(io.StringIO(data["csv"]))
    assert len(found) == len(results)
    assert found["value"].to_numpy() == pytest.approx(results["value"].to_numpy(), rel=1e-6)


def test_of_very_many_results_the_page_holds_the_means_over_shots(results):
    data = PageData()
    many = pd.concat([results.assign(seed=seed, value=results["value"] * (1 + seed / 7)) for seed in range(40)])
    data.hold_csv(many)
    assert not data.every_shot
    assert pd.read_csv(io.StringIO(data.csv))["shot"].isna().all()


def test_each_task_has_a_first_sentence():
    words = ["a: x.", "a: y.", "b: z.", "b: w.", "c: v."]
    assert first_sentences(words, ["a", "b", "c", "d"]) == ["a: x.", "b: z.", "c: v."]
    assert first_sentences(words[:4], ["a", "b"]) == ["a: x.", "b: z.", "a: y."]
    assert first_sentences(words[:1], ["a"]) == ["a: x."]
    long = "a: " + "gated_delta_net 100.0%, " * 30
    head, rest = folded(long)
    assert len(head) <= 200
    assert f"{head} {rest}" == long.strip()
    assert folded(words[0]) == ("a: x.", "")


def test_the_table_sorts_and_filters(desk):
    page = desk
    value = page.locator("#results thead th").nth(5)
    for direction, better in (("ascending", min), ("descending", max)):
        value.locator("button").click()
        assert value.get_attribute("aria-sort") == direction
        found = [
            float(v)
            for v in page.eval_on_selector_all("#results tbody td[data-value]", "c => c.map(x => x.dataset.value)")
        ]
        assert found[0] == better(found)
        assert found == sorted(found, reverse=direction == "descending")
    page.fill("#filter", "recall mambaformer")
    shown = page.eval_on_selector_all("#results tbody tr", "r => r.filter(x => !x.hidden).map(x => x.textContent)")
    assert shown
    assert all("mambaformer" in text and "recall" in text for text in shown)
    with page.expect_download() as download:
        page.click("#csv")
    assert len(pd.read_csv(download.value.path())) > 100


def test_the_axis_can_be_switched(desk):
    page = desk
    page.locator(".switch").first.click()
    page.wait_for_function("document.querySelector('.plot').layout.yaxis.type === 'log'")
    assert page.problems == []


def test_names_cannot_break_the_page(browser, tmp_path, run_record):
    evil = "</script><script>document.title='owned'</script>"
    models = (evil, *MODELS[1:])
    path = build_report(
        make_results(models=models), make_records(models), [run_record], [{"name": evil}], tmp_path / "evil.html"
    )
    page = opened(browser, path, 1280)
    assert "owned" not in page.title()
    assert page.problems == []
    page.close()


def test_several_runs_keep_their_names(tmp_path, records, run_record):
    both = pd.concat([make_results(run="one"), make_results(run="two")], ignore_index=True)
    runs = [{**run_record, "name": name} for name in ("one", "two")]
    text = build_report(both, records, runs, [{"name": "one"}, {"name": "two"}], tmp_path / "both.html").read_text()
    assert "one: transformer" in text
    assert "two: transformer" in text


def test_a_task_that_was_not_measured_as_in_training_still_has_its_section(tmp_path, records, run_record):
    results = make_results()
    results = results[results["split"] != "train"]
    assert len(results[results["metric"].notna() & (results["kind"] == "model")])
    text = build_report(results, records, [run_record], [{"name": "demo"}], tmp_path / "r.html").read_text()
    assert "Not measured on prompts as in training" in text


def test_a_run_without_finished_models_still_has_a_report(tmp_path, run_record):
    learners = make_results()
    learners = learners[learners["kind"] == "learner"]
    records = [{**r, "status": "failed", "message": "killed", "history": None} for r in make_records()]
    text = build_report(learners, records, [run_record], [{"name": "demo"}], tmp_path / "r.html").read_text()
    assert "killed" in text


def test_cost_figures(browser, tmp_path):
    frames = [
        cost_rows([1.0], metric=m, split="cost", length=n, seed=0)
        for m in ("state_bytes", "prefill_seconds")
        for n in (64, 128)
    ]
    page = opened(browser, write_cost_figure(pd.concat(frames), tmp_path / "cost.html"), 390)
    assert page.locator("figure[data-figure]").count() == 2
    assert page.problems == []
    page.close()
