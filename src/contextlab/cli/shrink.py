"""`contextlab shrink`: a trained model in fewer bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from contextlab.cli.converted import (
    TIMED,
    TimeOption,
    TransformersOption,
    finish,
    require_time,
    show_compared,
    title_of,
)
from contextlab.cli.shared import PARTS, PluginOption, console, load_components
from contextlab.cli.tables import print_table
from contextlab.errors import InputError
from contextlab.memory import LARGEST_WHOLE
from contextlab.words import bytes_in_words, counted

if TYPE_CHECKING:
    from contextlab.convert.base import Change
    from contextlab.convert.shrink import Shrunk


def shrink(
    model: Annotated[
        str, typer.Argument(help="A saved model, a run with one trained model, a checkpoint, a transformers folder.")
    ],
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            metavar="NAME[:KEY=VALUE,...]",
            help="What to do; several are done one after the other. contextlab list conversions tells the methods, "
            "with their options and defaults.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the new model and shrink.json; it must not be there yet.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE|TASK[:KEY=VALUE,...]",
            help="Text or a task to calibrate, heal and measure on; may be given many times.",
        ),
    ] = None,
    heal: Annotated[int, typer.Option(min=0, max=LARGEST_WHOLE, help="Steps of training afterwards.")] = 0,
    heal_with: Annotated[
        str,
        typer.Option(
            "--heal-with",
            metavar="full|lora|ia3|layer_skip[:KEY=VALUE,...]",
            help="What the healing trains: all weights, or adapters (options as in train.lora), which are merged, or "
            "stay beside layers that are stored in a form; "
            "layer_skip: all, to answer after any layer.",
        ),
    ] = "full",
    rate: Annotated[
        float | None,
        typer.Option("--rate", help="Learning rate of the healing.", show_default="0.0003, of adapters 0.003"),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, max=LARGEST_WHOLE, help="Of each task, to calibrate on.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_WHOLE, help="Of prompts and of what methods draw.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    time: TimeOption = TIMED,
    transformers: TransformersOption = None,
    plugin: PluginOption = None,
) -> None:
    """Make a trained model smaller, and say what was done to each layer and what it cost.

    Examples:

      contextlab shrink runs/mine --method magnitude:share=0.5 --out small

      contextlab shrink runs/byte-lm --method magnitude:pattern=2:4 --data notes.txt --heal 200 --out small

      contextlab shrink runs/byte-lm --method wanda --data notes.txt --heal 200 --heal-with lora:rank=8 --out small
    """
    load_components(plugin, (*PARTS, "conversion"))
    from contextlab.convert.methods import check_data, read_method
    from contextlab.convert.shrink import check_needs
    from contextlab.convert.shrink import shrink as convert
    from contextlab.experiments import find_own_model
    from contextlab.places import require_free
    from contextlab.training.distributed import resolve

    require_free(out)
    methods = [read_method(each, "shrink") for each in method]
    training = _healing(heal, heal_with, rate)
    check_needs(methods, bool(data), bool(heal))
    check_data(data)
    loaded = find_own_model(model, resolve(device))
    require_time(loaded, time)
    found = convert(
        loaded, methods, data, heal=training if heal else 0, prompts=prompts, seed=seed,
        transformers=bool(transformers), progress=None,
    )  # fmt: skip
    show(found)
    finish(found, out, loaded, model, time, transformers, source=model, seed=seed)


def show(found: Shrunk) -> None:
    """A table a method, then sizes, losses and healing in a line each."""
    for step in found.steps:
        title = title_of(step.method, step.options)
        if step.lines:
            print_table(title, _rows(step.lines), prose=["what was done"])
        else:
            console.print(f"[bold]{escape(title)}[/bold]: nothing was to be done\n")
    share = found.bytes_after / max(1, found.bytes_before)
    console.print(f"weights: {bytes_in_words(found.bytes_before)} -> {bytes_in_words(found.bytes_after)} ({share:.1%})")
    for length, (before, after) in found.state.items():
        if after != before:
            console.print(f"state at {length:,} tokens: {bytes_in_words(before)} -> {bytes_in_words(after)}")
    if found.losses:
        told = ", ".join(f"{when} {loss:.4g}" for when, loss in found.losses.items())
        console.print(f"training loss on {escape(found.data)}: {told}", soft_wrap=True)
    if found.healed is not None:
        healed = found.healed
        console.print(f"healing: {counted(healed.steps, 'step')}, {healed.seconds:.3g} s, {healed.status}")
    console.print()
    show_compared(found.compared)


def _healing(steps: int, what: str, rate: float | None) -> dict[str, Any]:
    """Keys of a TrainSpec. Raises InputError where something is to be trained for no steps."""
    from contextlab.convert.heal import heal_with

    if not steps and (what != "full" or rate is not None):
        told = f"heal-with: {what[:80]!r}" if what != "full" else f"rate: {rate:g}"
        raise InputError(f"{told} of how many steps? give --heal, for example --heal 200")
    return {"steps": steps, **heal_with(what)} | ({} if rate is None else {"learning_rate": rate})


def _rows(lines: list[Change]) -> list[dict[str, str]]:
    """Like layers of all blocks in one row; shrink.json has each."""
    alike: dict[tuple[str, str, str], list[Change]] = {}
    for line in lines:
        place = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", line.layer)
        alike.setdefault((place, line.did, line.of), []).append(line)
    rows = []
    for (place, did, of), found in alike.items():
        errors = [f"{line.error:.3g}" for line in (min(found, key=_error), max(found, key=_error))]
        rows.append(
            {
                "layer": place if len(found) > 1 else found[0].layer,
                "layers": str(len(found)),
                "what was done": did,
                "error": " to ".join(dict.fromkeys(errors)),
                "of": of,
                "before": bytes_in_words(sum(line.bytes_before for line in found)),
                "after": bytes_in_words(sum(line.bytes_after for line in found)),
            }
        )
    return rows


def _error(line: Change) -> float:
    return line.error
