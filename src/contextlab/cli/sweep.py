"""`contextlab sweep`: a recipe's models at many values of their fields, and the best of each; no file is written."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from contextlab.cli.run import (
    CheckOption,
    DeviceOption,
    EnsembleOption,
    JobsOption,
    LogOption,
    OnOption,
    OutOption,
    QuickOption,
    RecipeArgument,
    ResumeOption,
    ThreadsOption,
    run_recipe,
)
from contextlab.cli.shared import PluginOption, SetOption
from contextlab.errors import InputError


def sweep(
    recipe: RecipeArgument,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over",
            metavar="PATH=VALUES",
            help="A field and its values: 1e-3,3e-3 or '{log: [1e-4, 1e-2], n: 5}'; may be given many times.",
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Draw so many settings.", show_default="every combination of the values")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="How settings are drawn: random, or Optuna's tpe or gp.",
            show_default="random with --trials, else grid",
        ),
    ] = None,
    halving: Annotated[
        bool | None,
        typer.Option(
            "--halving/--no-halving",
            help="Drop the worse half of the trials at a quarter and at half of the steps; --set sweep.halving.KEY.",
            show_default="as the recipe says",
        ),
    ] = None,
    out: OutOption = None,
    changes: SetOption = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    check: CheckOption = False,
    quick: QuickOption = False,
    jobs: JobsOption = None,
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
    log: LogOption = None,
    on: OnOption = None,
    ensemble: EnsembleOption = "auto",
) -> None:
    """Train every model at many values of a field, choose the best on validation prompts, then measure that.

    Fields are train.KEY, options.KEY of the models that have such an option,
    spec.KEY of what comes of preset and options, and models.NAME. before any
    of these for one model. The run's folder holds the sweep, for --resume.

    Examples:

      contextlab sweep demo --over train.matrix_learning_rate=0.005,0.02,0.05

      contextlab sweep demo --over 'train.learning_rate={log: [1e-4, 1e-2], n: 5}' --over options.depth=2,4 --check

      contextlab sweep demo --over 'train.learning_rate={log: [1e-4, 1e-2]}' --trials 8 --halving
    """
    wanted: dict[str, Any] = {"over": {}}
    for path, values in map(parse_over, over or ()):
        if path in wanted["over"]:
            raise InputError(f"--over {path}: given twice; give all of its values at once, as {path}=1,2,3")
        wanted["over"][path] = values
    if trials is not None:
        wanted |= {"trials": trials, "sampler": sampler or "random"}
    elif sampler is not None:
        wanted["sampler"] = sampler
    if halving is not None:
        wanted["halving"] = halving
    run_recipe(
        recipe, changes or [], wanted, out=out, device=device, resume=resume, check=check, quick=quick, jobs=jobs,
        threads=threads, plugin=plugin or [], log=log or [], on=on, ensemble=ensemble,
    )  # fmt: skip


def parse_over(text: str) -> tuple[str, Any]:
    """train.learning_rate=1e-3,3e-3 -> the path and its values, which are YAML. Raises InputError."""
    from contextlab.strict_yaml import parse_yaml

    path, equals, values = text.partition("=")
    path, values = path.strip(), values.strip()
    if not (equals and path and values):
        raise InputError(
            f"--over {text[:80]!r}: expected path=values, for example train.learning_rate=1e-3,3e-3 or "
            "'train.learning_rate={log: [1e-4, 1e-2], n: 5}'"
        )
    return path, parse_yaml(values if values[0] in "[{" else f"[{values}]", f"--over {path}")
