"""What MkDocs does not do by itself: pages made from the code, links that leave docs/, formulas without a network.

- `reference/`: a page for each public package, from its `__all__`.
- `contributing.md`, `changelog.md`, `examples/`: files of the repository's root as pages.
- `papers/`: a page for each area of the index of papers, as `contextlab papers digest` writes it.
- `gallery.md`: with the reports that `python docs/gallery.py` has made.
- Formulas become MathML, which browsers draw themselves; no script is loaded for them.
"""

from __future__ import annotations

import ast
import posixpath
import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from contextlab.papers import areas, digest

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "build" / "gallery"
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PARTS = (
    *("mixers", "ops", "models", "policies", "tasks", "learners", "training", "evaluation", "convert", "experiments"),
    *("report", "papers", "claims", "constructions", "testing", "state", "prompt", "registry", "spec", "errors"),
    *("plugins", "tokenizer"),
)
PACKAGES = ["contextlab", *(f"contextlab.{name}" for name in PARTS)]
REPORT = re.compile(r"<!-- report: ([\w-]+) from (\S+) -->")
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
MATH = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made into the navigation."""
    for section in config.nav or []:
        if "Reference" in section:
            section["Reference"] += [{name: f"reference/{name}.md"} for name in PACKAGES]
        if "Papers" in section:
            section["Papers"] += [{area.title: f"papers/{area.name}.md"} for area in areas()]
        if "Extending" in section:
            section["Extending"] += [{path.name: f"examples/{path.name}.md"} for path in examples()]
    return config


def examples() -> list[Path]:
    return sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".yaml"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    made = {page: (ROOT / name).read_text() for name, page in ROOT_PAGES.items()}
    for example in examples():
        language = "yaml" if example.suffix == ".yaml" else "python"
        made[f"examples/{example.name}.md"] = f"# {example.name}\n\n```{language}\n{example.read_text()}```\n"
    made |= reference()
    made |= {f"papers/{area.name}.md": digest(area.name) for area in areas()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    for name, path in REPORT.findall((ROOT / "docs" / "gallery.md").read_text()):
        if (GALLERY / path).exists():
            files.append(File.generated(config, f"gallery/{name}.html", abs_src_path=str(GALLERY / path)))
    return files


def reference() -> dict[str, str]:
    """A page for each public package or module, and one that lists them."""
    pages, listed = {}, []
    for name in PACKAGES:
        source = ROOT / "src" / Path(*name.split("."))
        path = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        options = f"    options:\n      members: {public(path)}\n" if path.name == "__init__.py" else ""
        pages[f"reference/{name}.md"] = f"# `{name}`\n\n::: {name}\n{options}"
        listed.append(f"- [`{name}`]({name}.md): {summary}")
    words = "What may be imported. Everything that has a name is also told by `contextlab list` and `contextlab show`."
    pages["reference/README.md"] = f"# Reference\n\n{words}\n\n" + "\n".join(listed) + "\n"
    return pages


def public(path: Path) -> list[str]:
    """The names in a package's `__all__`, read without importing it."""
    names: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = re.findall(r"'(\w+)'", ast.unparse(node.value))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            names = [str(ast.literal_eval(key)) for key in node.value.keys if key is not None]  # type: ignore[attr-defined]
            break
    return names


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Send links to files of the repository to their pages; put the reports that there are into the gallery."""
    place = page.file.src_uri
    source = {to: name for name, to in ROOT_PAGES.items()}.get(place, f"docs/{place}")

    def turned(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in ROOT_PAGES:
            path = ROOT_PAGES[path]
        elif path.startswith("examples/"):
            path = f"{path}.md"
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        else:
            return match[0]
        return match[1] + posixpath.relpath(path, posixpath.dirname(place) or ".") + match[3]

    if not place.startswith("reference/"):
        markdown = LINK.sub(turned, markdown)
    return REPORT.sub(lambda match: framed(match[1], match[2]), markdown)


def framed(name: str, path: str) -> str:
    """A report of the gallery in a frame, or that it was not made."""
    if not (GALLERY / path).exists():
        return "*Not made for this copy of the site; `make docs` makes it.*"
    return (
        f'<iframe src="gallery/{name}.html" title="{name}" loading="lazy" class="report"></iframe>\n\n'
        f'<a href="gallery/{name}.html">Open it alone</a>'
    )


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML."""

    def drawn(match: re.Match[str]) -> str:
        return convert(unescape(match["tex"]), display="block" if match["tag"] == "div" else "inline")

    return MATH.sub(drawn, html)
