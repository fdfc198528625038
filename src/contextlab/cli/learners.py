"""`contextlab learners` and `contextlab similarity`: reference algorithms, alone and beside trained models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from contextlab.cli.shared import PluginOption, SetOption, console, load_components
from contextlab.cli.tables import print_table
from contextlab.errors import InputError, unknown
from contextlab.memory import LARGEST_WHOLE

POOL = 4
"""Prompts that `similarity` draws for each one that it compares."""


def learners(
    what: Annotated[str, typer.Argument(help="A task's name, or a recipe (a suite): its name or YAML file.")],
    preset: Annotated[str | None, typer.Option(help="A task's named difficulty.")] = None,
    changes: SetOption = None,
    prompts: Annotated[int, typer.Option(min=2, max=LARGEST_WHOLE, help="Prompts drawn for each split.")] = 1280,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_WHOLE, help="Of the prompts.")] = 20_000,
    splits: Annotated[bool, typer.Option("--splits", help="All splits of each task, not only train.")] = False,
    by: Annotated[str | None, typer.Option(help="Group by position, shot or another facet, e.g. distance.")] = None,
    out: Annotated[Path | None, typer.Option(help="A Parquet file for all that is measured.")] = None,
    plugin: PluginOption = None,
) -> None:
    """Measure the reference algorithms of a task or of a whole suite; nothing is trained."""
    import pandas as pd

    from contextlab import registry
    from contextlab.evaluation import breakdown, evaluate_learners, write_results
    from contextlab.experiments import load_recipe
    from contextlab.experiments.recipes import find_recipe, recipe_files, set_key
    from contextlab.files import present
    from contextlab.places import require_place
    from contextlab.report.learners import breakdown_table, learner_table
    from contextlab.tasks import build_task

    load_components(plugin)
    if out is not None:
        require_place(out.parent)
    if what in registry.names("task"):
        options: dict[str, Any] = {}
        for change in changes or []:
            set_key(options, change)
        tasks = {what: build_task(what, preset=preset, **options)}
    else:
        if preset is not None:
            raise InputError("--preset belongs to a task; a recipe says the presets of its tasks itself")
        if not present(Path(what)) and what not in (known := recipe_files()):
            raise InputError(unknown("task or recipe", what, [*registry.names("task"), *known]))
        spec = load_recipe(find_recipe(what), changes or [])
        tasks = {name: spec.build_task(name) for name in spec.tasks}
    chosen = None if splits else ("train",)
    if by is not None and (splits or out is not None):
        raise InputError("--by groups the predictions of the train split; leave out --splits and --out")
    parts = []
    for name, task in tasks.items():
        if by is not None:
            with console.status(f"{escape(name)} ..."):
                found = breakdown(task.learners(), task, by, bins=8, prompts=prompts, seed=seed)
            print_table(*breakdown_table(found, name, task))
            continue
        with console.status(f"{escape(name)} ..."):
            parts.append(evaluate_learners(task, prompts=prompts, seed=seed, splits=chosen, task_name=name))
        for title, rows in learner_table(parts[-1], {name: task}).items():
            print_table(title, rows)
    console.print(f"[dim]{prompts} prompts a split, seed {seed}.[/dim]")
    if out is not None:
        console.print(f"Results: {write_results(pd.concat(parts, ignore_index=True), out)}", soft_wrap=True)


def similarity(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    task: Annotated[str | None, typer.Option(help="A task of the run, by its name there.")] = None,
    split: Annotated[str, typer.Option(help="The split whose prompts are answered.")] = "train",
    prompts: Annotated[int, typer.Option(min=2, max=LARGEST_WHOLE, help="Prompts that are answered.")] = 512,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Read out each layer: how many steps of iterative learners does it come to?"),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="A CSV file for all that is measured.")] = None,
    plugin: PluginOption = None,
) -> None:
    """Which algorithm is it? Compare a run's trained models with the learners of their task.

    Examples:

      contextlab similarity runs/demo --task regression --split 'scaled inputs'

      contextlab similarity runs/demo --task regression --layers
    """
    import pandas as pd

    from contextlab import evaluation
    from contextlab.evaluation.intervals import Interval
    from contextlab.experiments import open_run
    from contextlab.files import write_atomic
    from contextlab.places import require_place
    from contextlab.report.alike import similarity_words
    from contextlab.report.naming import interval_in_words, record_tasks

    load_components(plugin)
    if out is not None:
        require_place(out.parent)
    opened = open_run(run)
    names = list(dict.fromkeys(name for record in opened.records for name in record_tasks(record)))
    if task is None and len(names) > 1:
        raise InputError(f"the run has several tasks; choose one by --task: {', '.join(names)}")
    task = task or names[0]
    built = opened.task(task)
    parts = []
    for name, model in opened.models(task).items():
        if layers:
            parts.append(_show_layers(name, model, task, built, split, prompts))
            continue
        with console.status(f"{escape(name)} ..."):
            found = evaluation.similarity(model, built, prompts=prompts, splits=(split,), pool=POOL)
        if found.empty:
            raise InputError(f"split {split!r} of {task} tells no learner from another; try another --split")
        parts.append(found.assign(model=name))
        whole = found[found["shot"].isna()]
        order = whole[whole["measure"] == "errors"].sort_values("value", ascending=False)["learner"]
        cells = {
            (row["learner"], row["measure"]): interval_in_words(
                Interval.known(row["value"], row["ci_low"], row["ci_high"]), ""
            )
            for _, row in whole[whole["measure"] != "behind"].iterrows()
        }
        measures = list(dict.fromkeys(measure for _, measure in cells))
        print_table(
            f"{name} on {task}, split {split}",
            [{"learner": str(each), **{str(m): cells.get((each, m), "-") for m in measures}} for each in order],
        )
        told = whole.assign(run="", model=name, seed=0, task=task).drop(columns="shot")
        for sentence in similarity_words(told):
            console.print(f"• {escape(sentence)}")
        console.print()
    if layers:
        legend = (
            "Steps at which an iterative learner's errors are most like those of what a linear read-out finds in each "
            "layer, and in brackets the cosine of the two (1: the same errors)."
        )
    else:
        legend = (
            f"On the {prompts} of {POOL * prompts} prompts drawn on which the candidates differ most. "
            "errors: cosine of the error vectors (1: the same errors). spd: mean squared difference of predictions. "
            "separation: that to the learner's nearest rival; an spd well below it tells the two apart. weights, ilwd: "
            "cosine and squared difference of induced weights."
        )
    console.print(f"[dim]{escape(legend)}[/dim]")
    if out is not None:
        write_atomic(out, pd.concat(parts, ignore_index=True).to_csv(index=False).encode())
        console.print(f"Results: {out}", soft_wrap=True)


def _show_layers(name: str, model: Any, task_name: str, task: Any, split: str, prompts: int) -> Any:
    """Print the best-matching steps of each iterative learner for each layer of a model; returns all that was found."""
    import pandas as pd

    from contextlab.evaluation import layer_read_outs, matching_steps

    steps = [*range(1, 17), 20, 24, 32, 48, 64]
    iterative = [each for each in ("newton", "gradient_descent") if each in task.learners()]
    if not iterative:
        raise InputError(
            f"--layers: the learners of task {task_name!r} ({', '.join(task.learners())}) take no steps to count; "
            "linear_regression has newton and gradient_descent"
        )
    parts, rows = [], []
    with console.status(f"{escape(name)} ..."):
        for layer, predictor in layer_read_outs(model, task).items():
            row = {"read out at": layer}
            for learner in iterative:
                found = matching_steps(predictor, task, learner, steps, split=split, prompts=prompts)
                parts.append(found.assign(model=name, layer=layer))
                best = found[found["best"] & found["shot"].isna()].iloc[0]
                row[learner] = f"{best['steps']} [{best['value']:.3f}]"
            rows.append(row)
    print_table(f"{name} on {task_name}, split {split}: steps of iterative learners", rows)
    return pd.concat(parts, ignore_index=True)
