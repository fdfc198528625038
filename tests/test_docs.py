"""The documentation: tables that are not stale, links that lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import contextlab.convert
import contextlab.mixers
import contextlab.policies
import contextlab.tasks  # noqa: F401  (each room registers what is in it)
from contextlab import registry

DOCS = Path(__file__).parent.parent / "docs"
OURS = [e for e in registry.entries("mixer") if e.factory.__module__.startswith("contextlab.")]
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def figures():
    pytest.importorskip("plotly")
    spec = importlib.util.spec_from_file_location("mixer_figures", DOCS / "mixer_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", sorted({entry.family for entry in OURS}))
def test_the_tables_are_those_of_the_registry(figures, family):
    text = figures.page(family).read_text()
    assert figures.renewed(text, family) == text, "stale: run python docs/mixer_figures.py"


def test_every_mixer_is_on_one_page(figures):
    listed = [entry.name for family in figures.FAMILIES for entry in figures.members(family)]
    assert sorted(listed) == [entry.name for entry in OURS]
    assert {figures.page(family) for family in figures.FAMILIES} == set((DOCS / "mixers").glob("*.md"))


@pytest.mark.parametrize("path", [*PAGES, DOCS.parent / "README.md"], ids=lambda path: path.stem)
def test_links_and_images_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mixer", "token mixers of"),
        ("task", "in-context tasks with"),
        ("policy", "policies that"),
        ("conversion", "conversions that"),
    ],
)
def test_the_readme_counts_what_is_registered(kind, words):
    ours = [e for e in registry.entries(kind) if e.factory.__module__.startswith("contextlab.")]
    (said,) = re.findall(rf"(\d+)\s+{words}", (DOCS.parent / "README.md").read_text())
    assert int(said) == len(ours)


def test_the_readmes_tree_is_that_of_the_folder():
    tree = re.search(r"```text\nsrc/contextlab/\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL).group(1)
    source = DOCS.parent / "src" / "contextlab"
    named = re.findall(r"^  (\S+)", tree, re.M)
    assert all((source / name).exists() for name in named)
    folders = {f"{path.name}/" for path in source.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {name for name in named if name.endswith("/")}
    assert all((DOCS.parent / name).exists() for name in re.findall(r"^(\w+/) ", tree, re.M))


def test_every_page_is_in_the_sites_navigation():
    nav = set(re.findall(r"\S+\.md", (DOCS.parent / "mkdocs.yml").read_text()))
    assert {str(page.relative_to(DOCS)) for page in PAGES} <= nav


def test_what_the_recall_page_says_follows_from_its_table():
    page = _script("recall_page")
    text = (DOCS / "recall.md").read_text()
    rows = page.parse(text)
    registered = {entry.name: entry for entry in OURS if entry.factory.causal}
    assert {row.name for row in rows} == set(registered) - {"parallel", "token_shift"}
    assert all(row.family == registered[row.name].family for row in rows)
    assert page.table(rows) in text
    assert page.sentences(rows) in text
    assert set(page.NARROW) < {row.name for row in rows}


def test_the_recall_page_tells_intervals_windows_and_the_frontier():
    page = _script("recall_page")
    names = {"attention": (99.9, 4096, "0.003 to 0.012"), "mla": (99.0, 3072, "0.003"), "gla": (40.0, 2048, ""),
             "hyena": (1.5, 2048, "0.003 to 0.012"), "ngram": (99.5, 2560, "0.006"), "delta_net": (99.9, 2048, "0.006"),
             "lstm": (5.0, 700, "0.003 to 0.006")}  # fmt: skip
    families = {name: registry.lookup("mixer", name).family for name in names}
    rows = [page.Row(name, families[name], share, share - 1, min(100.0, share + 1), size, "0.006", window, "4")
            for name, (share, size, window) in names.items()]  # fmt: skip
    assert page.parse(page.table(rows)) == rows
    assert [row.name for row in page.frontier(rows)] == ["lstm", "delta_net"]
    told = page.sentences(rows)
    assert "4 of 7 mixers reach 99% or more" in told
    assert "Not told apart from chance (1.6%) by these seeds and prompts: `hyena`." in told
    assert "0.006 for 7 mixers. 2 of 7 stay within 95% of their best from 0.003 to 0.012; 3 do so at one rate" in told
    figure = page.draw(rows)
    assert figure.data[-1].name == "frontier"
    mark = next(trace for trace in figure.data if trace.name == "recurrent")
    assert mark.error_y.array[0] == pytest.approx(0.01)
    setup = page.Setup(480, 4, 3, 512, 40.0, 2, "0.25 and 0.5", "step 120 of 480")
    whole = page.put(f"head\n{page.MARKS[0]}\nwhat was there before\n{page.MARKS[1]}\nfoot", page.written(setup, rows))
    assert whole.startswith(f"head\n{page.MARKS[0]}\n\n*At most 480 steps each, the best of 4 learning rates")
    assert "the validation score at step 120 of 480 stays within 95%" in whole
    assert whole.endswith("foot")
    assert "what was there before" not in whole
    later = [page.Row("gla", "linear", 90.0, 89.0, 91.0, 2048, "0.006", "0.006", "4")]
    again = page.renewed(whole, page.Setup(480, 4, 3, 512, 2.0, 2, "0.25 and 0.5", "step 120 of 480"), later)
    assert page.parse(again) == page.joined(whole, later)
    assert [row.accuracy for row in page.parse(again)] == [99.9, 99.9, 99.5, 99.0, 90.0, 5.0, 1.5]
    assert "`gla`: from a later run of the same recipe with these models alone. The run took 2 minutes.*" in again
    with pytest.raises(ValueError, match="the page is of other trainings"):
        page.renewed(whole, page.Setup(240, 4, 3, 512, 2.0, 2, "0.25 and 0.5", "step 120 of 480"), later)


def _script(name):
    """One of the scripts that write the docs, as a module."""
    pytest.importorskip("plotly")
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
