"""The command line: parses, calls, prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from contextlab import __version__
from contextlab.errors import ContextlabError, InputError, unknown
from contextlab.memory import LARGEST_WHOLE, limited_memory, plain_memory_errors

if TYPE_CHECKING:
    from contextlab.models import HuggingFaceSpec, ModelSpec

app = typer.Typer(
    name="contextlab",
    help="What can a sequence model learn from its context, what does that context cost, "
    "and what is lost when it is made cheaper?",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
ClickException: Any = typer.BadParameter.__mro__[2]  # click's own, or that of the copy inside newer versions of typer
KINDS = ("mixers", "mlps", "models", "tasks", "learners", "policies", "recipes")
FACTS = {"mixer": ("family", "state", "sequence", "token"), "policy": ("family", "needs")}

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
PluginOption = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="Import this module or .py file first, so that its components are known."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key; may be given many times.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"contextlab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command()
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
    with _Bars(total=len(spec.trainings()), quiet=not sys.stdout.isatty()) as bars:
        done = run_experiment(
            spec, out=out, device=device, resume=resume, jobs=jobs, plugins=plugin or [], progress=bars
        )
    _print_summary(done)
    if done.record["status"] != "finished":
        raise typer.Exit(1)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help=f"One of: {', '.join(KINDS)}.")],
    as_json: JsonOption = False,
    plugin: PluginOption = None,
) -> None:
    """List what is known by name: mixers, MLPs, models, tasks, learners, policies or recipes."""
    kind = _kind(kind)
    _load_components(plugin)
    if kind == "recipe":
        from contextlab.experiments import recipes

        rows: list[dict[str, Any]] = [{"name": r.name, "summary": r.description} for r in recipes()]
    else:
        from contextlab import registry

        rows = [{"name": e.name, "summary": e.summary, "papers": list(e.papers)} for e in registry.entries(kind)]
        if kind == "mixer":
            for row in rows:
                row.update(_mixer_facts(row["name"]))
        elif kind == "policy":
            for row in rows:
                row.update(_policy_facts(row["name"]))
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from contextlab.report.naming import bytes_in_words

    facts = FACTS.get(kind, ())
    wide = not facts or console.width >= 150  # a narrow terminal shows the facts first
    papers_too = kind != "recipe" and (not facts or console.width >= 100)
    table = Table(box=None, padding=(0, 2 if papers_too else 1, 0, 0))
    table.add_column("name", style="bold cyan", no_wrap=True)
    if wide:
        table.add_column("what it is")
    for fact in facts:
        table.add_column(fact, no_wrap=True)
    if papers_too:
        table.add_column("papers (arXiv)", style="dim")
    for row in rows:
        cells = [row["name"], row["summary"]] if wide else [row["name"]]
        if kind == "policy":
            cells += [row["family"], row["needs"]]
        elif facts:
            size = row["state_bytes"]
            held = "?" if size is None else "none" if size == 0 else f"{row['state_growth']}, {bytes_in_words(size)}"
            cells += [row["family"], held, f"{row['sequence_cost']} ({row['parallel_form']})", row["token_cost"]]
        if papers_too:
            papers = row["papers"]
            cells.append(", ".join(papers if wide else papers[:1]) + (", ..." if len(papers) > 1 and not wide else ""))
        table.add_row(*map(escape, cells))
    console.print(table)
    if kind == "policy":
        console.print("[dim]needs: what it must see of a prompt besides the keys and values.[/dim]")
    elif facts:
        console.print(
            "[dim]state: how it grows with the T tokens read, and its size after 4096 of them at width 64. sequence: "
            "operations for T tokens at once, and how they are done. token: time of one more after T.[/dim]"
        )
    console.print(f"[dim]contextlab show {kind} NAME tells more.[/dim]")


def _mixer_facts(name: str) -> dict[str, Any]:
    """A mixer's family, its parallel form and what it costs, with default options at width 64."""
    from contextlab import registry
    from contextlab.mixers import base, build_mixer

    factory: Any = registry.lookup("mixer", name).factory
    facts: dict[str, Any] = {"family": base.family_of(factory), "parallel_form": factory.parallel_form}
    costs = dict.fromkeys(("state_growth", "state_bytes", "sequence_cost", "token_cost"))
    try:
        mixer = build_mixer(name, width=64)
    except InputError:  # it has options that must be given
        return {**facts, **costs, "sequence_cost": "?", "token_cost": "?"}
    return {
        **facts,
        "state_growth": base.state_growth(mixer),
        "state_bytes": mixer.state_nbytes(4096) if mixer.causal else 0,
        "sequence_cost": base.sequence_cost(mixer),
        "token_cost": base.token_cost(mixer),
    }


def _policy_facts(name: str) -> dict[str, Any]:
    """A policy's family, and what it needs, with default options."""
    from contextlab import registry
    from contextlab.policies import build_policy

    factory: Any = registry.lookup("policy", name).factory
    facts = {"family": factory.__module__.rsplit(".", 1)[-1].replace("_", " ")}
    try:
        return {**facts, "needs": build_policy(name).needs or "nothing"}
    except InputError:  # it has options that must be given
        return {**facts, "needs": "?"}


@app.command()
def show(
    kind: Annotated[str, typer.Argument(help="mixer, mlp, model, task, learner, policy or recipe.")],
    name: Annotated[str, typer.Argument(help="A name that `contextlab list` shows.")],
    as_json: JsonOption = False,
    sample: Annotated[bool, typer.Option("--sample", help="A task: draw a prompt and print it.")] = False,
    preset: Annotated[str | None, typer.Option(help="A task's named difficulty, for --sample.")] = None,
    changes: SetOption = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_WHOLE, help="Of the prompt that --sample draws.")] = 0,
    plugin: PluginOption = None,
) -> None:
    """Show one component: what it is, its parameters with defaults, its papers, an example."""
    kind = _kind(kind)
    _load_components(plugin)
    if sample:
        _show_sample(kind, name, preset, changes or [], seed)
        return
    if preset or changes:
        raise InputError("--preset and --set belong to --sample, which draws a prompt of a task")
    if kind == "recipe":
        _show_recipe(name, as_json)
        return
    from contextlab import registry

    entry = registry.lookup(kind, name)
    example = _example(entry)
    if as_json:
        shown = {
            "kind": kind,
            "name": entry.name,
            "doc": entry.doc,
            "papers": list(entry.papers),
            **(_policy_facts(entry.name) if kind == "policy" else {}),
            "parameters": [
                {
                    "name": p.name,
                    "type": p.type,
                    "required": p.required,
                    "default": _plain(p.default),
                    "help": p.help,
                }
                for p in entry.parameters
            ],
            "example": example,
        }
        print(json.dumps(shown, indent=2))
        return
    console.print(f"[bold cyan]{escape(entry.name)}[/] [dim]({kind})[/]\n")
    console.print(escape(_flowing(_without_parameters(entry.doc, {p.name for p in entry.parameters}))) + "\n")
    if entry.papers:
        console.print("Papers: " + ", ".join(f"arXiv:{paper}" for paper in entry.papers) + "\n")
    if kind == "policy":
        facts = _policy_facts(entry.name)
        console.print(escape(f"Family: {facts['family']}. Needs besides keys and values: {facts['needs']}.\n"))
    if kind == "task" and (presets := entry.factory.presets):  # type: ignore[attr-defined]
        shown_presets = "; ".join(
            f"{name} ({', '.join(f'{key} {value}' for key, value in options.items())})"
            for name, options in presets.items()
        )
        console.print(escape(f"Presets: {shown_presets}\n"))
    if entry.parameters:
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("parameter", style="bold", no_wrap=True)
        table.add_column("default", no_wrap=True)
        table.add_column("meaning")
        for parameter in entry.parameters:
            default = "required" if parameter.required else str(_plain(parameter.default))
            table.add_row(parameter.name, escape(default), escape(parameter.help or parameter.type))
        console.print(table)
    console.print("\nExample:\n")
    console.print(example, style="green", markup=False, highlight=False)


@app.command()
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
    from contextlab.experiments.recipes import find_recipe, recipes, set_key
    from contextlab.report.learners import breakdown_table, learner_table
    from contextlab.tasks import build_task

    _load_components(plugin)
    if what in registry.names("task"):
        options: dict[str, Any] = {}
        for change in changes or []:
            set_key(options, change)
        tasks = {what: build_task(what, preset=preset, **options)}
    else:
        if preset is not None:
            raise InputError("--preset belongs to a task; a recipe says the presets of its tasks itself")
        if not Path(what).exists() and what not in (known := [recipe.name for recipe in recipes()]):
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
            _print_table(*breakdown_table(found, name, task))
            continue
        with console.status(f"{escape(name)} ..."):
            parts.append(evaluate_learners(task, prompts=prompts, seed=seed, splits=chosen, task_name=name))
        for title, rows in learner_table(parts[-1], {name: task}).items():
            _print_table(title, rows)
    console.print(f"[dim]{prompts} prompts a split, seed {seed}.[/dim]")
    if out is not None:
        console.print(f"Results: {write_results(pd.concat(parts, ignore_index=True), out)}", soft_wrap=True)


@app.command()
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
    from contextlab.experiments import open_run
    from contextlab.files import write_atomic
    from contextlab.report.naming import record_tasks

    _load_components(plugin)
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
            found = evaluation.similarity(model, built, prompts=prompts, splits=(split,))
        parts.append(found.assign(model=name))
        wide = found[found["shot"].isna()].pivot_table(index="learner", columns="measure", values="value", sort=False)
        wide = wide.sort_values("errors", ascending=False)
        _print_table(
            f"{name} on {task}, split {split}",
            [
                {"learner": str(learner), **{str(m): f"{v:.3g}" if v == v else "-" for m, v in row.items()}}
                for learner, row in wide.iterrows()
            ],
        )
    if layers:
        legend = (
            "Steps at which an iterative learner's errors are most like those of what a linear read-out finds in each "
            "layer, and in brackets the cosine of the two (1: the same errors)."
        )
    else:
        legend = (
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
    _print_table(f"{name} on {task_name}, split {split}: steps of iterative learners", rows)
    return pd.concat(parts, ignore_index=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs that have results.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Put several runs into one self-contained HTML report."""
    import pandas as pd

    from contextlab.experiments import open_run
    from contextlab.experiments.recipes import read_yaml
    from contextlab.report import build_report

    opened = [open_run(folder) for folder in runs]
    names = [each.record["name"] for each in opened]
    if len(set(names)) < len(names):  # two runs of one recipe: tell them apart by their folders
        names = [each.folder.name for each in opened]
        for each, name in zip(opened, names, strict=True):
            for rows in (each.results, each.facets, each.similarity):
                rows["run"] = name
    if out.is_dir():
        raise InputError(f"{out}: is a folder; expected the name of an HTML file")
    build_report(
        pd.concat([each.results for each in opened], ignore_index=True),
        [{**record, "run": name} for each, name in zip(opened, names, strict=True) for record in each.records],
        [each.record for each in opened],
        [read_yaml(each.folder / "experiment.yaml") for each in opened],
        out,
        facets=pd.concat([each.facets for each in opened], ignore_index=True),
        similarity=pd.concat([each.similarity for each in opened], ignore_index=True),
        compressed={name: each.compressed for each, name in zip(opened, names, strict=True)},
    )
    console.print(f"Report: {out}", soft_wrap=True)


@app.command()
def cost(
    model: Annotated[str, typer.Argument(help="A preset's name, a ModelSpec's YAML file, or a saved model's folder.")],
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens; k stands for 1024.")] = "256,1k,4k,16k",
    changes: SetOption = None,
    batch: Annotated[int, typer.Option(min=1, max=LARGEST_WHOLE, help="Sequences at once.")] = 1,
    repeats: Annotated[
        int, typer.Option(min=1, max=LARGEST_WHOLE, help="Times that each figure is measured; the median is told.")
    ] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for cost.parquet and cost.html.", show_default="costs/MODEL")
    ] = None,
    as_json: JsonOption = False,
    plugin: PluginOption = None,
) -> None:
    """Measure what context costs a model: FLOPs, state bytes, prefill and decode time, peak memory by length.

    Example: contextlab cost gated_delta_net --lengths 256,1k,4k --set width=128
    """
    from contextlab.evaluation import cost as measure
    from contextlab.evaluation import write_results
    from contextlab.report import write_cost_figure
    from contextlab.training.distributed import resolve

    _load_components(plugin)
    spec = _model_spec(model, changes or [])
    name = Path(model).stem if Path(model).exists() else model
    sizes = _lengths(lengths)
    chosen = resolve(device)
    with console.status(f"measuring {name} at {', '.join(map(str, sizes))} tokens"):
        results = measure(spec, sizes, batch=batch, repeats=repeats, device=chosen, name=name, plugins=plugin or [])
    folder = out or Path("costs") / name
    write_results(results, folder / "cost.parquet")
    write_cost_figure(results, folder / "cost.html")
    if as_json:
        print(results.to_json(orient="records", indent=2))
        return
    _print_costs(results, name)
    console.print(f"Figure: {folder / 'cost.html'}   Table: {folder / 'cost.parquet'}", soft_wrap=True)


@app.command()
def compress(
    model: Annotated[
        str, typer.Argument(help="A run's or a checkpoint's folder, a saved model, a Hugging Face folder or hub name.")
    ],
    policy: Annotated[
        list[str],
        typer.Option(
            "--policy", metavar="NAME[:KEY=VALUE,...]", help="What to keep; may be given many times. A|B combines two."
        ),
    ],
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="How much of it: 10%, 512tok or 64MB (a sequence); may be given many times."),
    ] = None,
    task: Annotated[
        str, typer.Option(help="Tasks on tokens, by commas: needle, kv_retrieval, mqar, text, or a registered one.")
    ] = "needle,text",
    lengths: Annotated[str, typer.Option(help="Tokens in the prompts, about; k stands for 1024.")] = "512",
    prompts: Annotated[int, typer.Option(min=2, max=LARGEST_WHOLE, help="Prompts of each task and length.")] = 32,
    batch: Annotated[int, typer.Option(min=1, max=LARGEST_WHOLE, help="Prompts at once; each batch is timed.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_WHOLE, help="Of the prompts.")] = 0,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare", metavar="MODEL", help="Draw in another model, without a policy; constant-state, say."
        ),
    ] = None,
    decoded: Annotated[
        int, typer.Option(min=1, max=LARGEST_WHOLE, help="Tokens of text and mqar that are read one by one, at most.")
    ] = 128,
    fit: Annotated[
        int,
        typer.Option(min=0, max=LARGEST_WHOLE, help="Train policies that must be, such as locret, for so many steps."),
    ] = 0,
    skip: Annotated[
        bool, typer.Option("--skip", help="Leave out what a policy, budget or task does not allow, and say so.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.parquet and compress.html.", show_default="compressed/MODEL")
    ] = None,
    plugin: PluginOption = None,
) -> None:
    """What does a model lose, and win, when policies keep a part of its context?

    Examples:

      contextlab compress runs/byte-lm --policy snapkv:window=8 --policy h2o:window=8 --budget 10% --budget 25%

      contextlab compress runs/byte-lm --policy 'tova|quantize:bits=4' --budget 192kB --task text --lengths 512,1k
    """
    from contextlab.evaluation import write_results
    from contextlab.evaluation.compress import compress as measure
    from contextlab.experiments import find_model
    from contextlab.report import compress_table, compress_words, write_compress_page
    from contextlab.training.distributed import resolve

    _load_components(plugin)
    chosen = resolve(device)
    name, loaded, tokenizer = find_model(model, chosen)
    others = {label: other for label, other, _ in (find_model(each, chosen) for each in compare or [])}
    left_out: list[str] | None = [] if skip else None
    if name in others or len(others) < len(compare or []):
        raise InputError("--compare: two models have the same name; give folders that are called differently")
    with console.status("measuring ...") as status:
        results = measure(
            loaded, policy, budget or [], _tasks(task), _lengths(lengths), prompts=prompts, batch=batch, seed=seed,
            name=name, tokenizer=tokenizer, compare=others, decoded=decoded, fit=fit, left_out=left_out,
            progress=lambda text: status.update(escape(text)),
        )  # fmt: skip
    folder = out or Path("compressed") / name
    write_results(results, folder / "results.parquet")
    write_compress_page(results, folder / "compress.html", left_out or ())
    for title, rows in compress_table(results).items():
        if console.width < 100:  # what is left out is in the table file
            rows = [
                {key: re.split(r" ±| \(", cell)[0] for key, cell in row.items() if key not in ("peak", "prefill")}
                for row in rows
            ]
        _print_table(title, rows)
    for sentence in compress_words(results):
        console.print(f"• {escape(sentence)}")
    for line in left_out or ():
        console.print(f"[dim]left out: {escape(line)}[/dim]", soft_wrap=True)
    console.print(
        "[dim]state: bytes of one sequence. decode, prefill: times as fast as the full cache on the same prompts "
        "(least-most of the batches). KL: of the full cache's predictions to these, nats.[/dim]"
    )
    console.print(f"Figure: {folder / 'compress.html'}   Table: {folder / 'results.parquet'}", soft_wrap=True)


def _tasks(text: str) -> list[str]:
    """needle:depth=0.5,text -> the two; commas before an option belong to the task before."""
    found: list[str] = []
    for part in text.split(","):
        if found and ":" in found[-1] and re.match(r"\s*\w+\s*=", part):
            found[-1] += f",{part}"
        else:
            found.append(part.strip())
    return list(dict.fromkeys(found))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say which versions, devices and backends are in use, and why each op gets the backend that it gets."""
    from contextlab.evaluation.machine import machine_record
    from contextlab.ops.backend import backends

    record = machine_record()
    record.pop("backends", None)
    found = [vars(each) if not hasattr(each, "_asdict") else each._asdict() for each in backends()]
    if as_json:
        print(json.dumps({**record, "backends": found}, indent=2))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in _flat(record):
        table.add_row(key, escape(str(value)))
    console.print(table)
    ops = Table(title="ops", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in found[0]:
        ops.add_column(column)
    for each in found:
        ops.add_row(*(escape(str(value)) for value in each.values()))
    console.print(ops)


@app.command()
def schema(
    what: Annotated[str, typer.Argument(help="experiment, model, task, train or evaluate.")] = "experiment",
) -> None:
    """Print the JSON Schema of a spec, for editors that check YAML while you type."""
    from contextlab.evaluation import EvaluateSpec
    from contextlab.experiments import ExperimentSpec
    from contextlab.models import ModelSpec
    from contextlab.tasks import TaskSpec
    from contextlab.training import TrainSpec

    specs: dict[str, Any] = {
        "experiment": ExperimentSpec,
        "model": ModelSpec,
        "task": TaskSpec,
        "train": TrainSpec,
        "evaluate": EvaluateSpec,
    }
    if what not in specs:
        raise InputError(unknown("spec", what, specs))
    print(json.dumps(specs[what].model_json_schema(), indent=2))


class _Bars:
    """A live bar for each training; one line an event when the output is no terminal."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.quiet = quiet
        self.bars: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> _Bars:
        if not self.quiet:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self.quiet:
            self.progress.stop()

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        if not self.quiet:
            self.progress.update(self._bar(key), completed=step, total=steps, loss=f"loss {loss:.4g}")

    def phase(self, key: str, text: str) -> None:
        if self.quiet:
            print(f"{key}: {text}", flush=True)
        elif not key.startswith("learners."):
            self.progress.update(self._bar(key), description=f"{_short(key)} [dim]{text}[/]")

    def done(self, key: str, status: str, message: str) -> None:
        text = f"{status}: {message}" if message else status
        if self.quiet:
            print(f"{key}: {text}", flush=True)
        elif not key.startswith("learners.") or status != "finished":
            colour = "green" if status == "finished" else "red"
            self.progress.update(self._bar(key), description=f"{_short(key)} [{colour}]{escape(text[:60])}[/]")

    def _bar(self, key: str) -> TaskID:
        if key not in self.bars:
            self.bars[key] = self.progress.add_task(_short(key), total=None, loss="")
        return self.bars[key]


def _short(key: str) -> str:
    """regression.transformer.seed0 -> regression / transformer / 0, without the seed when it is 0."""
    parts = key.split(".")
    seed = parts[-1].removeprefix("seed")
    return escape(" / ".join(parts[:-1] + ([f"seed {seed}"] if seed not in ("0", parts[-1]) else [])))


def _print_summary(done: Any) -> None:
    from contextlab.report import compress_words, kept_table, suite_table, summary_table, summary_words

    console.print()
    for title, rows in summary_table(done.results, done.records).items():
        _print_table(title, rows)
    if overview := suite_table(done.results):
        _print_table("all tasks", overview)
    for sentence in summary_words(done.results, done.records):
        console.print(f"• {escape(sentence)}")
    for record in done.records:
        if record["status"] not in ("finished",):
            console.print(f"[red]{escape(record['key'])} {record['status']}: {escape(record['message'])}[/]")
    if not done.compressed.empty:
        _print_table("how much of the full cache's quality is kept", _narrowed(kept_table(done.compressed)))
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


def _print_table(title: str, rows: list[dict[str, str]]) -> None:
    console.print(f"[bold]{escape(title)}[/]")
    table = Table(header_style="dim", box=None)
    for i, column in enumerate(rows[0]):
        table.add_column(escape(column), justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    console.print(table)
    console.print()


def _print_costs(results: Any, name: str) -> None:
    wide = results.pivot_table(index="length", columns="metric", values="value", observed=True)
    table = Table(title=escape(name), title_justify="left", header_style="dim", box=None)
    table.add_column("tokens", justify="right")
    formats = {
        "parameters": ("parameters", lambda v: f"{int(v):,}"),
        "flops": ("GFLOP", lambda v: f"{v / 1e9:.3g}"),
        "state_bytes": ("state", lambda v: _bytes(v)),
        "prefill_seconds": ("prefill", lambda v: f"{v * 1e3:.3g} ms"),
        "decode_seconds_per_token": ("decode / token", lambda v: f"{v * 1e3:.3g} ms"),
        "peak_bytes": ("peak memory", lambda v: _bytes(v)),
    }
    shown = [metric for metric in formats if metric in wide]
    for metric in shown:
        table.add_column(formats[metric][0], justify="right")
    for length, row in wide.iterrows():
        table.add_row(f"{length:,}", *(formats[m][1](row[m]) if row[m] == row[m] else "-" for m in shown))
    console.print(table)


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def _kind(kind: str) -> str:
    """mixers -> mixer. Raises InputError with the nearest kind."""
    singular = {plural: "policy" if plural == "policies" else plural[:-1] for plural in KINDS}
    chosen = singular.get(kind, kind)
    if chosen not in singular.values():
        raise InputError(unknown("kind", kind, KINDS))
    return chosen


def _load_components(plugins: list[str] | None) -> None:
    import contextlab.learners
    import contextlab.mixers
    import contextlab.models
    import contextlab.policies
    import contextlab.tasks  # noqa: F401
    from contextlab.plugins import load_plugins

    load_plugins(plugins or [])


def _show_sample(kind: str, name: str, preset: str | None, changes: list[str], seed: int) -> None:
    """Draw one prompt of a task and print it as a person reads it."""
    import torch

    from contextlab.experiments.recipes import set_key
    from contextlab.tasks import build_task

    if kind != "task":
        raise InputError(f"--sample draws a prompt of a task; a {kind} has none")
    options: dict[str, Any] = {}
    for change in changes:
        set_key(options, change)
    task = build_task(name, preset=preset, **options)
    prompt = task.sample(1, torch.Generator().manual_seed(seed))
    console.print(task.words(prompt), markup=False, highlight=False)
    count, what = int(prompt.scored.sum()), "vectors" if task.read_in == "vector" else "tokens"
    chance = ", ".join(f"{metric} {value:.3g}" for metric, value in task.chance().items())
    console.print(
        f"[dim]{prompt.length} {what}, {count} predictions scored; best known learner: "
        f"{escape(next(iter(task.learners())))}" + (f"; by chance: {escape(chance)}" if chance else "") + "[/dim]"
    )


def _show_recipe(name: str, as_json: bool) -> None:
    from contextlab.experiments import find_recipe, load_recipe

    path = find_recipe(name)
    if as_json:
        print(load_recipe(path).model_dump_json(indent=2, exclude_unset=True))
    else:
        console.print(path.read_text(), markup=False, highlight=False)
        console.print(f"[dim]contextlab run {escape(name)}[/dim]")


def _example(entry: Any) -> str:
    sizes = {"width": 64} if entry.kind in ("mixer", "mlp") else {}
    case: dict[str, Any] = next((dict(case) for case in entry.cases if case and _builds(entry, {**sizes, **case})), {})
    options = "".join(f", {key}={value!r}" for key, value in case.items())
    if entry.kind in ("mixer", "mlp"):
        return f'contextlab.build_{entry.kind}("{entry.name}", width=64{options})'
    if entry.kind == "model":
        return (
            f'contextlab.build_model("{entry.name}", input_size=128, output_size=128, read_in="token")\n'
            f"contextlab cost {entry.name} --lengths 256,1k"
        )
    if entry.kind == "policy":
        budget = ', budget="10%"' if any(p.name == "budget" for p in entry.parameters) else ""
        return (
            f'policy = contextlab.build_policy("{entry.name}"{budget}{options})\n'
            "with policy.attach(model):\n    written = model.generate(prompt, 100)"
        )
    return f'contextlab.build_{entry.kind}("{entry.name}"{options})'


def _builds(entry: Any, options: dict[str, Any]) -> bool:
    """Whether the options fit together, so that they can be shown as an example."""
    if entry.kind not in ("mixer", "mlp"):
        return True
    try:
        entry.build(**options)
    except InputError:
        return False
    return True


def _without_parameters(doc: str, parameters: set[str]) -> str:
    """The docstring without its parameter lines, which the table shows."""
    kept, skipping, depth = [], False, 0
    for line in doc.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip().partition(":")[0] in parameters and ":" in line:
            skipping, depth = True, indent
        elif not (skipping and line.strip() and indent > depth):
            skipping = False
            kept.append(line)
    return "\n".join(kept).strip()


def _flowing(doc: str) -> str:
    """The text with the breaks inside its paragraphs taken out, for the terminal to break; indented lines stay."""
    lines: list[str] = []
    for line in doc.splitlines():
        follows = bool(lines and lines[-1] and not lines[-1][0].isspace() and line and not line[0].isspace())
        if follows:
            lines[-1] += " " + line
        else:
            lines.append(line)
    return "\n".join(lines)


def _model_spec(model: str, changes: list[str]) -> ModelSpec | HuggingFaceSpec:
    """The spec of a preset's name, a YAML file, a saved model or a Hugging Face checkpoint.

    Token sizes are filled in where none are given.
    """
    from contextlab.experiments.recipes import read_yaml, set_key
    from contextlab.files import read_json
    from contextlab.models import ModelSpec, preset

    data: dict[str, Any] = {}
    path = Path(model)
    if path.is_dir():
        if not (path / "model.json").exists() and (path / "config.json").exists():
            if changes:
                raise InputError("--set changes a spec of ours; a Hugging Face checkpoint is taken as it is")
            from contextlab.models.hub import describe_checkpoint

            return describe_checkpoint(path)
        if not (path / "model.json").exists():
            raise InputError(f"{path}: no saved model there (expected model.json, or a checkpoint's config.json)")
        data = read_json(path / "model.json")
    elif path.exists() or path.suffix in (".yaml", ".yml"):
        data = read_yaml(path)
    if data:
        for change in changes:
            set_key(data, change)
        spec = ModelSpec.parse(data)
    else:
        options: dict[str, Any] = {}
        for change in changes:
            set_key(options, change)
        spec = preset(model, **options)
    if spec.input_size is None or spec.output_size is None:
        spec = ModelSpec.parse({**spec.model_dump(), "read_in": "token", "input_size": 256, "output_size": 256})
    return spec


def _lengths(text: str) -> list[int]:
    """256,1k,4k -> [256, 1024, 4096]."""
    found = []
    for part in text.split(","):
        word = part.strip().lower()
        number, factor = (word[:-1], 1024) if word.endswith("k") else (word, 1)
        if not number.isdigit() or int(number) < 1:
            raise InputError(f"--lengths: expected numbers of tokens such as 256,1k,4k, got {part.strip()[:80]!r}")
        if len(number) > 10 or int(number) * factor > LARGEST_WHOLE:
            raise InputError(f"--lengths: at most {LARGEST_WHOLE} tokens, got {part.strip()[:80]}")
        found.append(int(number) * factor)
    return sorted(set(found))


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in record.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)


def _largest_given(arguments: list[str]) -> str:
    """The largest size that the command line gives, as what to change when memory is short."""
    sizes: list[tuple[float, str]] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        key, _, value = argument.rpartition("=") if "=" in argument else (before, "", argument)
        if not ("=" in argument or before in ("--prompts", "--batch", "--lengths")):
            continue
        for number in re.findall(r"(?<![\w.])\d+(?:_\d+)*(?:\.\d+)?(?:e\+?\d+)?", value):
            if float(number) >= 1000:
                sizes.append((float(number), f"{key}{'=' if '=' in argument else ' '}{number}"))
    return f"; make something smaller: the largest size given is {max(sizes)[1]}" if sizes else ""


def _yield_cores() -> None:
    """On a busy machine let waiting threads sleep: OpenMP's spin, and take the cores from whom they wait for.

    Twice to three times as fast there; where no one else works it would make a decoded token twice as slow, and nothing
    is changed. It must come before torch is loaded.
    """
    own = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    if not any(name in os.environ for name in own) and _busy():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _busy() -> bool:
    """Whether others want the cores now. The load average alone remembers those, too, who have just ended."""
    if not hasattr(os, "getloadavg") or os.getloadavg()[0] <= 0.75:
        return False
    running = []
    for _ in range(5):
        now = _running()
        if now is None:
            return True
        running.append(now)
        time.sleep(0.004)
    return sorted(running)[2] > 1


def _running() -> int | None:
    """Threads of the machine that run or want to, this one counted; None where the system does not tell."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return None


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a part failed, 2 wrong input, 130 interrupted."""
    _yield_cores()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with plain_memory_errors(_largest_given(sys.argv[1:])), limited_memory():
            code = app(standalone_mode=False)
    except ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ContextlabError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; unfinished runs go on with --resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
