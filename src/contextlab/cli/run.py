"""`contextlab run`: train, evaluate and report an experiment."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from contextlab.cli.bars import Bars
from contextlab.cli.shared import PluginOption, SetOption, console
from contextlab.cli.tables import print_table
from contextlab.errors import InputError


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, a YAML file, or an unfinished run's folder.")],
    out: Annotated[
        Path | None, typer.Option(help="The run's folder.", show_default="runs/NAME, or runs/NAME-2 ... when taken")
    ] = None,
    changes: SetOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Run the recipe's form for a laptop.")] = False,
    jobs: Annotated[
        int | None, typer.Option(help="Trainings at once.", show_default="one a core on CPU, one on CUDA")
    ] = None,
    plugin: PluginOption = None,
) -> None:
    """Train, evaluate and report an experiment.

    Examples:

      contextlab run demo

      contextlab run demo --set train.steps=200 --set 'seeds=[0,1,2]' --out runs/short

      contextlab run mixers-on-recall --quick

      contextlab run runs/demo --resume
    """
    from contextlab.experiments import load_plugins, load_recipe, quick_form
    from contextlab.experiments import run as run_experiment

    load_plugins(plugin or [])
    if quick:
        recipe = quick_form(recipe)
    path = Path(recipe)
    if path.is_dir() and (path / "experiment.yaml").exists():
        if out is not None and out != path:
            raise InputError(f"{recipe} is a run's folder already; leave out --out")
        out, recipe = path, str(path / "experiment.yaml")
    spec = load_recipe(recipe, changes or [])
    with Bars(total=len(spec.trainings()), quiet=not sys.stdout.isatty()) as bars:
        done = run_experiment(
            spec, out=out, device=device, resume=resume, jobs=jobs, plugins=plugin or [], progress=bars
        )
    _print_summary(done)
    if done.record["status"] != "finished":
        raise typer.Exit(1)


def _print_summary(done: Any) -> None:
    from contextlab.report import compress_words, kept_table, suite_table, summary_table, summary_words

    console.print()
    for title, rows in summary_table(done.results, done.records).items():
        print_table(title, rows)
    if overview := suite_table(done.results):
        print_table("all tasks", overview)
    for sentence in summary_words(done.results, done.records):
        console.print(f"• {escape(sentence)}")
    for record in done.records:
        if record["status"] not in ("finished",):
            console.print(f"[red]{escape(record['key'])} {record['status']}: {escape(record['message'])}[/]")
    if not done.compressed.empty:
        print_table("how much of the full cache's quality is kept", _narrowed(kept_table(done.compressed)))
        for sentence in compress_words(done.compressed):
            console.print(f"• {escape(sentence)}")
        console.print(f"\nPolicies: {done.folder / 'compress.html'}", soft_wrap=True)
    console.print(f"\nResults: {done.folder / 'results.parquet'}", soft_wrap=True)
    console.print(f"Report:  [bold]{done.report}[/]", soft_wrap=True)


def _narrowed(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of policies for a narrow console: names without options where that tells them apart, whole per cents."""
    if console.width >= 120:
        return rows
    names = ["|".join(part.partition(":")[0] for part in row["policy"].split("|")) for row in rows]
    short = {
        row["policy"]: name if names.count(name) == 1 else row["policy"] for row, name in zip(rows, names, strict=True)
    }
    return [
        {key: short[cell] if key == "policy" else re.sub(r"\.\d%", "%", cell) for key, cell in row.items()}
        for row in rows
    ]
