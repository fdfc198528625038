"""`contextlab merge`: one model of several, or a deeper one of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from contextlab.cli.converted import TimeOption, TransformersOption, finish
from contextlab.cli.shared import PARTS, PluginOption, load_components
from contextlab.cli.shrink import show
from contextlab.memory import LARGEST_WHOLE


def merge(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Saved models, runs with one trained model, checkpoints.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the new model and its record; it must not be there yet.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME[:KEY=VALUE,...]",
            help="Of the families merge and growth of contextlab list conversions, which tells options and defaults.",
        ),
    ] = "average",
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What all were trained on from, for task_arithmetic and ties."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE|TASK[:KEY=VALUE,...]", help="Text or a task to tell losses on."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, max=LARGEST_WHOLE, help="Of each task.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_WHOLE, help="Of the prompts.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    time: TimeOption = 0,
    transformers: TransformersOption = None,
    plugin: PluginOption = None,
) -> None:
    """Make one model of several of one form, or a deeper one of one, and say how far it is from the first.

    Examples:

      contextlab merge runs/a runs/b --method slerp:t=0.3 --out merged

      contextlab merge runs/a runs/b --base runs/before --method ties:density=0.2 --out merged

      contextlab merge runs/a --method expand:count=2 --out deeper
    """
    load_components(plugin, (*PARTS, "conversion"))
    from contextlab.convert.merge import merge as convert
    from contextlab.convert.methods import check_data, read_method
    from contextlab.experiments import find_own_model
    from contextlab.places import require_free
    from contextlab.training.distributed import resolve

    require_free(out)
    wanted = read_method(method, "merge")
    check_data(data)
    chosen = resolve(device)
    loaded = [find_own_model(each, chosen) for each in models]
    from_ = None if base is None else find_own_model(base, chosen)
    found = convert(loaded, wanted, data, base=from_, prompts=prompts, seed=seed, transformers=bool(transformers))
    show(found)
    finish(found, out, loaded[0], models[0], time, transformers, source=models, base=base, seed=seed)
