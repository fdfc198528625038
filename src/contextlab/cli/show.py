"""`contextlab show`: one component, or a prompt of a task."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from contextlab.cli.catalogue import facts_of, read_kind
from contextlab.cli.shared import JsonOption, PluginOption, SetOption, console, load_components
from contextlab.cli.tables import print_table
from contextlab.errors import InputError
from contextlab.kinds import KINDS, PAGES
from contextlab.memory import LARGEST_WHOLE
from contextlab.words import bytes_in_words

if TYPE_CHECKING:
    from contextlab.registry import Entry


def show(
    kind: Annotated[str, typer.Argument(help=f"{', '.join(KINDS)} or recipe.")],
    name: Annotated[str, typer.Argument(help="A name that `contextlab list` shows.")],
    as_json: JsonOption = False,
    sample: Annotated[bool, typer.Option("--sample", help="A task: draw a prompt and print it.")] = False,
    preset: Annotated[str | None, typer.Option(help="A task's named difficulty, for --sample.")] = None,
    changes: SetOption = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_WHOLE, help="Of the prompt that --sample draws.")] = 0,
    plugin: PluginOption = None,
) -> None:
    """Show one component: what it is, its parameters with defaults, its papers, an example."""
    kind = read_kind(kind)
    load_components(plugin, (kind,) if kind in KINDS else ())
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
    if as_json:
        print(json.dumps(_record(entry), indent=2))
    else:
        _print(entry)


def _record(entry: Entry) -> dict[str, Any]:
    """All that is told of a component."""
    return {
        "kind": entry.kind,
        "name": entry.name,
        "doc": entry.doc,
        "papers": list(entry.papers),
        **facts_of(entry),
        "parameters": [
            {"name": p.name, "type": p.type, "required": p.required, "default": _plain(p.default), "help": p.help}
            for p in entry.parameters
        ],
        "example": _example(entry),
    }


def _print(entry: Entry) -> None:
    console.print(f"[bold cyan]{escape(entry.name)}[/] [dim]({entry.kind})[/]\n")
    console.print(escape(_flowing(_without_parameters(entry.doc, {p.name for p in entry.parameters}))) + "\n")
    if entry.papers:
        console.print("Papers: " + ", ".join(f"arXiv:{paper}" for paper in entry.papers) + "\n")
    console.print(escape(" ".join(_sentences(entry))) + "\n")
    if entry.kind == "task" and (presets := entry.factory.presets):  # type: ignore[attr-defined]
        shown = "; ".join(
            f"{name} ({', '.join(f'{key} {value}' for key, value in options.items())})"
            for name, options in presets.items()
        )
        console.print(escape(f"Presets: {shown}\n"))
    from contextlab.policies.core.parse import written

    if entry.parameters and entry.kind != "figure":  # a figure is handed a task's tables; it has no options
        rows = [
            {
                "parameter": parameter.name,
                "default": "required" if parameter.required else written(parameter.default),
                "meaning": parameter.help or parameter.type,
            }
            for parameter in entry.parameters
        ]
        print_table("", rows, prose=["meaning"])
    console.print("Example:\n")
    console.print(_example(entry), style="green", markup=False, highlight=False, soft_wrap=True)  # to be copied


def _sentences(entry: Entry) -> Iterator[str]:
    """The family, and what else a kind declares or is measured by."""
    facts = facts_of(entry)
    yield f"Family: {facts['family']}."
    if entry.kind == "figure":
        yield f"Drawn on: {PAGES[entry.page]}."
    elif entry.kind == "policy":
        yield f"Needs besides keys and values: {facts['needs']}."
    elif entry.kind == "conversion":
        yield f"Needs besides the model: {facts['needs']}."
    elif facts.get("state_bytes"):
        yield (
            f"State: {bytes_in_words(facts['state_bytes'])} after 4096 tokens at width 64, {facts['state_growth']}. "
            f"T tokens at once: {facts['sequence_cost']} operations ({facts['parallel_form']})."
        )


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
        f"[dim]{prompt.length} {what}, {count} prediction{'s' if count != 1 else ''} scored; best known learner: "
        f"{escape(next(iter(task.learners())))}" + (f"; by chance: {escape(chance)}" if chance else "") + "[/dim]"
    )


def _show_recipe(name: str, as_json: bool) -> None:
    from contextlab.experiments import find_recipe, load_recipe
    from contextlab.experiments.stages import load_stages

    path = find_recipe(name)
    if as_json:
        stages = load_stages(path)
        if stages is not None:
            print(json.dumps(stages.data, indent=2))
        else:
            print(load_recipe(path).model_dump_json(indent=2, exclude_unset=True))
    else:
        print(path.read_text().rstrip("\n"))  # without line breaks of the console's: it is to be written to a file
        if sys.stdout.isatty():
            print(f"\ncontextlab run {name}", file=sys.stderr)


def _example(entry: Any) -> str:
    sizes: dict[str, Any] = {"width": 64} if entry.kind in ("mixer", "mlp") else {}
    case: dict[str, Any] = next((dict(case) for case in entry.cases if case and _builds(entry, {**sizes, **case})), {})
    options = "".join(f", {key}={value!r}" for key, value in case.items())
    if entry.kind in ("mixer", "mlp"):
        return f'contextlab.build_{entry.kind}("{entry.name}", width=64{options})'
    if entry.kind == "model" and hasattr(entry.factory, "construction"):
        return f'contextlab.build_model("{entry.name}"{options})\ncontextlab cost {entry.name} --lengths 8,32'
    if entry.kind == "model":
        return (
            f'contextlab.build_model("{entry.name}", input_size=128, output_size=128, read_in="token")\n'
            f"contextlab cost {entry.name} --lengths 256,1k"
        )
    if entry.kind == "linear":
        entry_of_spec = {"layers": "*", "form": entry.name, **({"options": case} if case else {})}
        return (
            f'contextlab.build_model("transformer", input_size=128, output_size=128, read_in="token", '
            f"linear=[{entry_of_spec}])"
        )
    if entry.kind == "figure":
        return {
            "cost": "contextlab cost transformer --lengths 256,1k",
            "compress": "contextlab compress runs/byte-lm --policy tova --budget 25%",
        }.get(entry.page, "contextlab report runs/demo")
    if entry.kind == "policy":
        budget = ', budget="10%"' if any(p.name == "budget" for p in entry.parameters) else ""
        return (
            f'policy = contextlab.build_policy("{entry.name}"{budget}{options})\n'
            "with policy.attach(model):\n    written = model.generate(prompt, 100)"
        )
    if entry.kind == "conversion":
        return _conversion_example(entry, case)
    if entry.kind == "probe":
        return f"contextlab inspect runs/demo --task recall --probe {entry.name}"
    return f'contextlab.build_{entry.kind}("{entry.name}"{options})'


def _conversion_example(entry: Any, case: dict[str, Any]) -> str:
    """A command."""
    from contextlab.policies.core.parse import write_options

    options = write_options(case)
    if entry.family in ("linearize", "kv"):
        data = " --data notes.txt" if entry.factory.needs else ""
        return f"contextlab convert runs/mine --to '{entry.name}{':' * bool(options)}{options}'{data} --out cheaper"
    data = " --data notes.txt" if "calibration" in entry.factory.needs else ""
    method = f"--method '{entry.name}{':' * bool(options)}{options}'"
    if entry.family in ("merge", "growth"):
        more = "" if entry.family == "growth" else " runs/other"
        base = " --base runs/before" if getattr(entry.factory, "wants_base", False) else ""
        return f"contextlab merge runs/mine{more}{base} {method} --out made"
    return f"contextlab shrink runs/mine {method}{data} --out small"


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
