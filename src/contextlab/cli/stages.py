"""Recipes in stages on the command line, and what models take over from those that they start from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.markup import escape

from contextlab.cli import run as one
from contextlab.cli.bars import Bars
from contextlab.cli.shared import console, going_on


def run_stages(stages: Any, check: bool, *, out: Path | None, resume: bool, **options: Any) -> None:
    """Run a recipe in stages, one after another, or only check it. options: of `run`."""
    from contextlab.experiments import run as run_experiment
    from contextlab.experiments.check import check as try_all
    from contextlab.experiments.jobs import all_jobs
    from contextlab.experiments.stages import claim
    from contextlab.training.distributed import resolve

    chosen = resolve(options["device"])

    def tell(name: str, spec: Any) -> None:
        console.print(f"\nstage [bold]{escape(name)}[/]")
        one.print_check(spec, options["device"], options["jobs"], options["threads"])

    if check:
        stages.each(tell)
        return
    stages.each(lambda _, spec: try_all(spec, chosen))
    folder = claim(stages, out, resume)
    with going_on(lambda: f"go on with: contextlab run {folder} --resume"):
        for stage in stages.turns(folder):
            console.print(f"\nstage [bold]{escape(stage.name)}[/]")
            with Bars(all_jobs(stage.spec), quiet=not sys.stdout.isatty()) as bars:
                done = run_experiment(stage.spec, out=stage.folder, resume=stage.begun, progress=bars, **options)
            one.print_run(done)


def print_starts(spec: Any) -> None:
    """Print what models take over from those that they start from, each of several that are alike once."""
    told: dict[tuple[str, ...], str] = {}
    for training in spec.trainings():
        if training.start is not None:
            lines = tuple(training.start.plan(training.model).lines())
            told.setdefault(lines, f"{training.model_name} starts from {training.start.source.text}")
    for training in spec.trainings():
        if training.teaching is not None:
            told.setdefault((training.teaching.words(),), f"{training.model_name} learns")
    for lines, what in told.items():
        console.print(f"[bold]{escape(what)}[/]: {escape('; '.join(lines))}", highlight=False, soft_wrap=True)
