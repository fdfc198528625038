"""`contextlab list` and `contextlab show`: what is known by name."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from contextlab.cli.shared import JsonOption, PluginOption, SetOption, console, load_components
from contextlab.errors import InputError, unknown
from contextlab.memory import LARGEST_WHOLE

KINDS = ("mixers", "mlps", "models", "tasks", "learners", "policies", "recipes")
FACTS = {"mixer": ("family", "state", "sequence", "token"), "policy": ("family", "needs")}


def list_(
    kind: Annotated[str, typer.Argument(help=f"One of: {', '.join(KINDS)}.")],
    as_json: JsonOption = False,
    plugin: PluginOption = None,
) -> None:
    """List what is known by name: mixers, MLPs, models, tasks, learners, policies or recipes."""
    kind = _kind(kind)
    load_components(plugin)
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
        table.add_column(fact, no_wrap=fact != "needs")  # a sentence, where the others are words
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

    facts = {"family": registry.lookup("policy", name).family}
    try:
        return {**facts, "needs": build_policy(name).needs or "nothing"}
    except InputError:  # it has options that must be given
        return {**facts, "needs": "?"}


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
    load_components(plugin)
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


def _kind(kind: str) -> str:
    """mixers -> mixer. Raises InputError with the nearest kind."""
    singular = {plural: "policy" if plural == "policies" else plural[:-1] for plural in KINDS}
    chosen = singular.get(kind, kind)
    if chosen not in singular.values():
        raise InputError(unknown("kind", kind, KINDS))
    return chosen


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


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)
