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
    """Print what each model takes over from the one that it starts from: once for all seeds, alike models together."""
    starts: dict[tuple[str, str], str] = {}
    learns: dict[tuple[str, str], str] = {}
    for training in spec.trainings():
        if training.start is not None:
            told = "; ".join(training.start.plan(training.model).lines())
            starts.setdefault((training.model_name, told), training.start.source.text)
        if training.teaching is not None:
            learns.setdefault((training.model_name, training.teaching.words()), "")
    alike: dict[tuple[str, str, str], list[str]] = {}
    for verb, each in (("start", starts), ("learn", learns)):
        for (name, told), source in each.items():
            alike.setdefault((verb, source, told), []).append(name)
    for (verb, source, told), names in alike.items():
        what = f"{', '.join(names)} {verb}{'s' if len(names) == 1 else ''}{f' from {source}' if source else ''}"
        console.print(f"[bold]{escape(what)}[/]: {escape(told)}", highlight=False, soft_wrap=True)
