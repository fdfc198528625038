"""`contextlab run` and `contextlab evaluate`: train, evaluate and report an experiment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from contextlab.cli.bars import Bars
from contextlab.cli.shared import PluginOption, SetOption, console
from contextlab.cli.tables import print_table
from contextlab.errors import InputError
from contextlab.words import counted

JobsOption = Annotated[
    int | None, typer.Option(help="Trainings at once.", show_default="one a core on CPU, one on CUDA")
]
RecipeArgument = Annotated[str, typer.Argument(help="A recipe's name, a YAML file, or an unfinished run's folder.")]
OutOption = Annotated[
    Path | None, typer.Option(help="The run's folder.", show_default="runs/NAME, or runs/NAME-2 ... when taken")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with an unfinished run, or make again what one lacks.")
]
CheckOption = Annotated[
    bool, typer.Option("--check", help="Try all that the recipe names, say what a run would do and take, and stop.")
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Run the recipe's form for a laptop.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        help="Of each training; equal threads give equal bits, whatever --jobs.",
        show_default="its share of the cores",
    ),
]
LogOption = Annotated[
    list[str] | None,
    typer.Option(help="Tell a tracker too: tensorboard, wandb, trackio or mlflow; may be given more than once."),
]
EnsembleOption = Annotated[
    str,
    typer.Option(
        metavar="auto|off",
        help="Train seeds and trials of a small model as one program: auto means on a GPU, where the model allows it.",
    ),
]

OnOption = Annotated[
    str | None,
    typer.Option("--on", help="ray or ray:ADDRESS: do the jobs on a cluster that sees the run's folder."),
]


def run(
    recipe: RecipeArgument,
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
    """Train, evaluate and report an experiment.

    Examples:

      contextlab run demo

      contextlab run demo --check

      contextlab run demo --set train.steps=200 --set 'seeds=[0,1,2]' --out runs/short

      contextlab run mixers-on-recall --quick

      contextlab run runs/demo --resume
    """
    run_recipe(
        recipe, changes or [], None, out=out, device=device, resume=resume, check=check, quick=quick, jobs=jobs,
        threads=threads, plugin=plugin or [], log=log or [], on=on, ensemble=ensemble,
    )  # fmt: skip


def run_recipe(
    recipe: str,
    changes: list[str],
    sweep: Any,
    *,
    out: Path | None,
    device: str,
    resume: bool,
    check: bool,
    quick: bool,
    jobs: int | None,
    threads: int | None,
    plugin: list[str],
    log: list[str],
    on: str | None,
    ensemble: str = "auto",
) -> None:
    """What `run` and `sweep` do. sweep: plain data of a SweepSpec that extends the recipe's own; None for none."""
    from contextlab.cli.stages import run_stages
    from contextlab.experiments import load_plugins, load_recipe, quick_form
    from contextlab.experiments import run as run_experiment
    from contextlab.experiments.folder import RunFolder
    from contextlab.experiments.jobs import all_jobs
    from contextlab.experiments.record import require_plugins
    from contextlab.experiments.stages import load_stages

    if quick:
        recipe = quick_form(recipe)
    path = Path(recipe)
    if path.is_dir() and (path / "experiment.yaml").exists():
        if out is not None and out != path:
            raise InputError(f"{recipe} is a run's folder already; leave out --out")
        out, recipe = path, str(path / "experiment.yaml")
        require_plugins(RunFolder(path), plugin)
    load_plugins(plugin)
    stages = load_stages(recipe, changes)
    if stages is not None:
        if sweep is not None:
            raise InputError(f"{recipe}: has stages; give a stage its sweep in the recipe: stages.NAME.sweep")
        if path.is_dir():
            out = path
        run_stages(stages, check, out=out, device=device, resume=resume, jobs=jobs, threads=threads,
                   plugins=plugin, log=log, on=on, ensemble=ensemble)  # fmt: skip
        return
    spec = load_recipe(recipe, changes, sweep)
    if check:
        print_check(spec, device, jobs, threads)
        return
    with Bars(all_jobs(spec), quiet=not sys.stdout.isatty()) as bars:
        done = run_experiment(
            spec,
            out=out,
            device=device,
            resume=resume,
            jobs=jobs,
            threads=threads,
            plugins=plugin,
            progress=bars,
            log=log,
            on=on,
            ensemble=ensemble,
        )
    print_run(done)


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run whose models are trained.")],
    changes: SetOption = None,
    jobs: JobsOption = None,
    plugin: PluginOption = None,
) -> None:
    """Measure a trained run again with another evaluation, and report; nothing is trained.

    Examples:

      contextlab evaluate runs/demo --set evaluate.prompts=8192

      contextlab evaluate runs/demo --set 'tasks.recall.evaluate={splits: [train]}'
    """
    from contextlab.experiments import evaluate_run
    from contextlab.experiments.folder import RunFolder
    from contextlab.experiments.jobs import all_jobs
    from contextlab.experiments.recipes import load_recipe
    from contextlab.experiments.record import require_plugins
    from contextlab.plugins import load_plugins

    at = RunFolder(folder)
    if not at.spec.exists():
        raise InputError(f"{folder}: no run there (expected {at.spec.name} and {at.record.name})")
    require_plugins(at, plugin or [])
    load_plugins(plugin or [])
    with Bars(all_jobs(load_recipe(at.spec)), quiet=not sys.stdout.isatty()) as bars:
        done = evaluate_run(folder, changes or [], jobs=jobs, plugins=plugin or [], progress=bars)
    print_run(done)


def print_run(done: Any) -> None:
    """Print what a run found. Ends with exit code 1 where a part of it has failed."""
    _print_summary(done)
    if done.record["status"] != "finished":
        raise typer.Exit(1)


def print_check(spec: Any, device: str, jobs: int | None, threads: int | None) -> None:
    """Print what a run would train and about how long it would take, all of it tried and timed here."""
    from contextlab.cli.stages import print_starts
    from contextlab.experiments.check import check
    from contextlab.experiments.estimate import estimate
    from contextlab.experiments.paths import setting_words
    from contextlab.report.naming import count_in_words
    from contextlab.training.distributed import resolve

    chosen = resolve(device)
    with console.status("trying each task and model ..."):
        check(spec, chosen)
    with console.status("timing a few steps of each training ..."):
        found = estimate(spec, chosen, jobs, threads)
    # Where all are drawn afresh there is nothing to tell, and a column less leaves room for names.
    fixed = any(training.train.examples for training in spec.trainings())
    swept = any(training.trial is not None for training in spec.trainings())
    set_ = any(each.setting for each in found.trainings)
    rows = [
        {
            "task": each.task,
            "model": each.model,
            **({"setting": setting_words(each.setting)} if set_ else {}),
            **({"trials": f"{each.trials:,}"} if swept else {}),
            "seeds": str(each.seeds),
            "parameters": count_in_words(each.parameters),
            "steps": f"{each.steps:,}",
            **({"prompts": f"{each.prompts:,} x {each.epochs:.4g}"} if fixed else {}),
            "training": seconds_in_words(each.training),
            "evaluation": seconds_in_words(each.evaluating),
        }
        for each in found.trainings
    ]
    print_table("what would be trained", rows)
    print_starts(spec)
    halved = any(spec.halving_of(name) for name in spec.models)
    console.print(
        f"{counted(found.count, 'training')}, {'at most ' * halved}{counted(found.steps, 'step')} in all"
        f"{' (trials are halved)' * halved}; learners of "
        f"{counted(len(found.learners), 'task')} "
        f"({seconds_in_words(sum(found.learners.values()))})"
    )
    cores = counted(found.threads, "thread")
    at_once = f"{found.jobs} at once, {cores} each" if found.jobs > 1 else cores
    console.print(
        f"{'At most about' if halved else 'About'} [bold]{seconds_in_words(found.seconds)}[/] in all on {chosen.type} "
        f"({at_once})."
    )
    left_out = [
        *(["what compress measures"] if spec.compress is not None else []),
        *(["what inspect looks at"] if spec.inspect is not None else []),
        *(["online play"] if any(_plays(spec.build_task(t), spec.evaluate_spec(t)) for t in spec.tasks) else []),
        *(["compiling"] if any(t.train.compile == "on" for t in spec.trainings()) else []),
    ]
    console.print(
        f"[dim]{'prompts: drawn for each seed, and how often each is shown (epochs). ' * fixed}"
        f"{'seeds: those that decide; the others train at what they choose. ' * halved}"
        "An estimate: each training's steps and one batch of prompts were timed alone; "
        "times in the table are of one training from one seed."
        + (f" Not counted: {', '.join(left_out)}." if left_out else "")
        + " Nothing was written."
        "[/dim]"
    )


def _plays(task: Any, evaluate: Any) -> bool:
    """Whether the task is played online after training."""
    from contextlab.tasks.decisions import DecisionTask

    return isinstance(task, DecisionTask) and evaluate.rollouts > 0


def seconds_in_words(seconds: float) -> str:
    """90 -> 1.5 min."""
    for unit, size in (("s", 60.0), ("min", 60.0), ("h", 48.0)):
        if seconds < size:
            return f"{seconds:.2g} {unit}" if seconds < 10 else f"{seconds:.0f} {unit}"
        seconds /= 60.0 if unit != "h" else 24.0
    return f"{seconds:.1f} days"


def _print_summary(done: Any) -> None:
    from contextlab.report import (
        chosen_table,
        compress_words,
        kept_tables,
        not_served,
        suite_table,
        summary_table,
        summary_words,
    )
    from contextlab.report.digest import Digest

    digest = Digest(done.results, done.by_prompt)
    console.print()
    for title, rows in summary_table(done.results, done.records, done.by_prompt, digest).items():
        print_table(title, rows)
    if overview := suite_table(done.results, done.by_prompt, digest):
        print_table("all tasks", overview)
    if chosen := chosen_table(done.records):
        print_table("chosen on validation prompts (window: where the score is within 95% of the best)", chosen)
    for sentence in summary_words(done.results, done.records, done.by_prompt, digest):
        console.print(f"• {escape(sentence)}")
    for record in done.records:
        if record["status"] not in ("finished",):
            console.print(f"[red]{escape(record['key'])} {record['status']}: {escape(record['message'])}[/]")
    keys = {record["key"] for record in done.records}
    for each in done.record.get("failed", ()):
        if each["job"] not in keys:
            console.print(f"[red]{escape(each['job'])} failed: {escape(each['message'])}[/]")
    if not done.compressed.empty:
        for title, rows in kept_tables(done.compressed).items():
            print_table(f"how much of the full cache's quality is kept: {title}", rows)
        for sentence in compress_words(done.compressed):
            console.print(f"• {escape(sentence)}")
        for line in not_served(done.compressed):
            console.print(f"[dim]not served: {escape(line)}[/dim]", soft_wrap=True)
        console.print(f"\nPolicies: {done.folder / 'compress.html'}", soft_wrap=True)
    if not done.inspected.empty:
        from contextlab.inspect.looking import looked_words

        for sentence in looked_words(done.inspected):
            console.print(f"• {escape(sentence)}")
        console.print(f"\nInside:  {done.folder / 'inspect.html'}", soft_wrap=True)
    if plugins := done.record.get("plugins"):
        from contextlab.plugins import plugin_options

        again = f"contextlab run {done.folder / 'experiment.yaml'}{plugin_options(plugins)}"
        console.print(f"\nAgain:   {again}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"\nResults: {done.folder / 'results.parquet'}", soft_wrap=True)
    console.print(f"Report:  [bold]{done.report}[/]", soft_wrap=True)
