"""What the site is made from: links that leave docs/, names of the reference, docstrings, reports."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    return script("site_hooks")


@pytest.mark.parametrize(
    ("page", "link", "turned"),
    [
        ("extend/task.md", "../../examples/my_task.py", "../examples/my_task.py.md"),
        ("how-to/README.md", "../../CONTRIBUTING.md", "../contributing.md"),
        ("contributing.md", "docs/extend/task.md", "extend/task.md"),
        ("policies.md", "tasks/text.md#needle", "tasks/text.md#needle"),
        ("policies.md", "https://arxiv.org/abs/2306.14048", "https://arxiv.org/abs/2306.14048"),
    ],
)
def test_links_to_files_of_the_repository_lead_to_their_pages(hooks, page, link, turned):
    place = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert hooks.on_page_markdown(f"[x]({link})", place, None, None) == f"[x]({turned})"


def test_the_reference_has_all_that_a_package_makes_public(hooks):
    for name in hooks.PACKAGES:
        path = ROOT / "src" / Path(*name.split("."))
        if path.is_dir():
            module = importlib.import_module(name)
            assert sorted(hooks.public(path / "__init__.py")) == sorted(set(module.__all__) - {"__version__"})


def test_formulas_are_drawn_without_a_script(hooks):
    html = hooks.on_page_content(r'<p>a <span class="arithmatex">\(x &lt; y\)</span></p>', None, None, None)
    assert "<math" in html
    assert "<mo>&#x0003C;</mo>" in html
    assert "arithmatex" not in html


def test_lines_of_parameters_become_a_list():
    pytest.importorskip("griffe")
    text = "Summary: short.\n\nx: [B, T].\nk, v: two\n    lines.\n\nRaises InputError."
    listed = script("docstrings").listed(text)
    assert listed == "Summary: short.\n\n- **x**: [B, T].\n- **k, v**: two\n    lines.\n\nRaises InputError."


def test_the_gallery_names_a_command_for_each_report():
    commands = script("gallery").commands((ROOT / "docs" / "gallery.md").read_text())
    assert [words[1] for words in commands] == ["run", "run", "compress", "cost"]
