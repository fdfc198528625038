"""`contextlab report`: several runs in one page."""

from __future__ import annotations

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
    import pandas as pd

    from contextlab.experiments import open_run
    from contextlab.experiments.recipes import read_yaml
    from contextlab.report import build_report

    load_components(plugin, ("figure",))
    opened = [open_run(folder) for folder in runs]
    names = [each.record["name"] for each in opened]
    if len(set(names)) < len(names):  # two runs of one recipe: tell them apart by their folders
        names = [each.folder.name for each in opened]
        for each, name in zip(opened, names, strict=True):
            for rows in (each.results, each.facets, each.similarity, each.by_prompt):
                rows["run"] = name
    if out.is_dir():
        raise InputError(f"{out}: is a folder; expected the name of an HTML file")
    build_report(
        pd.concat([each.results for each in opened], ignore_index=True),
        [{**record, "run": name} for each, name in zip(opened, names, strict=True) for record in each.records],
        [{**each.record, "name": name} for each, name in zip(opened, names, strict=True)],
        [read_yaml(each.folder / "experiment.yaml") for each in opened],
        out,
        facets=pd.concat([each.facets for each in opened], ignore_index=True),
        similarity=pd.concat([each.similarity for each in opened], ignore_index=True),
        by_prompt=pd.concat([each.by_prompt for each in opened], ignore_index=True),
        compressed={name: each.compressed for each, name in zip(opened, names, strict=True)},
    )
    console.print(f"Report: {out}", soft_wrap=True)
