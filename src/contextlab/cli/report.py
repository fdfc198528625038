"""`contextlab report`: several runs in one page."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated

import typer

from contextlab.cli.shared import PluginOption, console, load_components
from contextlab.errors import InputError


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs that have results.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    plugin: PluginOption = None,
) -> None:
    """Put several runs into one self-contained HTML report."""
    from contextlab.evaluation import Measured
    from contextlab.experiments import open_run
    from contextlab.experiments.recipes import read_yaml
    from contextlab.places import require_place
    from contextlab.report import build_report
    from contextlab.report.merged import told_apart

    load_components(plugin, ("figure",))
    require_place(out.parent)
    opened = [open_run(folder) for folder in runs]
    own = [each.record["name"] for each in opened]
    names = _names(own, runs)
    if names != own:
        for each, name in zip(opened, names, strict=True):
            for rows in (each.results, each.facets, each.similarity, each.by_prompt):
                rows["run"] = name
    if out.is_dir():
        raise InputError(f"{out}: is a folder; expected the name of an HTML file")
    specs = [read_yaml(each.folder / "experiment.yaml") for each in opened]
    tables, records, apart = told_apart(
        names,
        [Measured(each.results, each.facets, each.similarity, each.by_prompt) for each in opened],
        [each.records for each in opened],
        specs,
    )
    whole = Measured.join(tables)
    build_report(
        whole.results,
        [{**record, "run": name} for own, name in zip(records, names, strict=True) for record in own],
        [{**each.record, "name": name} for each, name in zip(opened, names, strict=True)],
        specs,
        out,
        facets=whole.facets,
        similarity=whole.similarity,
        by_prompt=whole.by_prompt,
        compressed={name: each.compressed for each, name in zip(opened, names, strict=True)},
        inspected={name: each.inspected for each, name in zip(opened, names, strict=True)},
    )
    for sentence in apart:
        console.print(f"• {sentence}", soft_wrap=True, markup=False)
    console.print(f"Report: {out}", soft_wrap=True)


def _names(names: list[str], folders: list[Path]) -> list[str]:
    """Names that tell runs apart: their own, or where two are of one recipe as much of the folders' paths as it takes.

    Raises InputError where a folder is given twice: its seeds would count as more of them.
    """
    there: dict[Path, Path] = {}
    for folder in folders:
        if (other := there.setdefault(folder.resolve(), folder)) is not folder:
            also = "" if other == folder else f" (as {other}, too)"
            raise InputError(f"{folder}: given twice{also}; expected different runs")
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    for depth in itertools.count(1):
        if len(set(names)) == len(names):
            return names
        names = ["/".join(each[-depth:]) for each in parts]
    raise AssertionError("paths of different folders differ")
