"""The documentation: tables that are not stale, links that lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import contextlab.mixers  # noqa: F401  (registers every mixer)
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
    ("kind", "words"), [("mixer", "token mixers of"), ("task", "in-context tasks with"), ("policy", r"policies that")]
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
    text = (DOCS / "recall.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\w -]+) \| ([\d.]+)% \| ([\d.]+) (B|KiB) \|$", text, re.M)
    found = {
        name: (family, float(share), float(size) * (1024 if unit == "KiB" else 1))
        for name, family, share, size, unit in rows
    }
    registered = {entry.name: entry for entry in OURS if entry.factory.causal}
    assert set(found) == set(registered) - {"parallel", "token_shift"}
    assert all(family == registered[name].family for name, (family, _, _) in found.items())
    words = " ".join(text.partition("What can be read from it:")[2].split())
    for name in set(re.findall(r"`(\w+)`", words)):
        assert name in found, name
    share = {name: value for name, (_, value, _) in found.items()}
    assert min(share[name] for name, (family, _, _) in found.items() if family == "delta") == 99.7
    assert max(value for _, value, size in found.values() if size <= 1280) < 7
    assert max(share[name] for name in ("sliding_window", "sigmoid_window", "block_local", "transformer_xl")) < 18
    assert max(share[name] for name in ("hierarchical_memory", "lm2", "titans_mac")) == 12.5
    assert 0.7 < found["mla"][2] / found["attention"][2] < 0.8
    assert all(
        found[name][2] < 0.55 * found["attention"][2] for name, (family, _, _) in found.items() if family == "delta"
    )
    for number in re.findall(r"(\d+\.\d)%", words):
        assert float(number) in share.values(), number
