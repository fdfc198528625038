"""`contextlab inspect`: looking inside a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contextlab.cli.shared import JsonOption, PluginOption, console, load_components
from contextlab.cli.tables import print_table
from contextlab.errors import InputError, nearest, unknown

if TYPE_CHECKING:
    from collections.abc import Sequence


def inspect_(
    model: Annotated[
        str,
        typer.Argument(
            help="A saved model, a run with one trained model, a checkpoint, a transformers folder, a preset."
        ),
    ],
    sites: Annotated[
        bool, typer.Option("--sites", help="List the places at which values can be captured and patched.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Of --sites those that match, such as 'blocks.0.**'; may be given many times."
        ),
    ] = None,
    as_json: JsonOption = False,
    plugin: PluginOption = None,
) -> None:
    """Look inside a model: the places that contextlab.capture and contextlab.patch take, in any mixer.

    Example: contextlab inspect gated_delta_net --sites
    """
    from contextlab.inspect import listing

    load_components(plugin)
    if not sites:
        raise InputError("inspect: say what to look at: --sites lists the places that can be captured and patched")
    rows = listing(_model(model), only or ("*",))
    if as_json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return
    shown = [
        {"site": row.pattern, "layers": _numbers(row.layers), "shape": row.shape, "what": row.what} for row in rows
    ]
    print_table(f"places of {Path(model).name}", shown, prose=["what"])
    console.print(
        "B rows, T tokens. The input and output of any module further inside are places, too, such as "
        "blocks.0.mixer.out_proj.input."
    )


def _model(name: str) -> Any:
    """A trained model, or a preset that is not trained."""
    from contextlab import registry
    from contextlab.cli.cost import model_spec
    from contextlab.experiments import find_model
    from contextlab.files import present
    from contextlab.models import ModelSpec, build_model

    if not present(Path(name)):
        presets = registry.names("model")
        if name in presets:
            spec = model_spec(name, [])
            assert isinstance(spec, ModelSpec)
            return build_model(spec).eval()
        if nearest(name, presets):
            raise InputError(unknown("model", name, presets))
    return find_model(name)[1]


def _numbers(layers: Sequence[int]) -> str:
    """0 to 3, 5: runs of numbers."""
    runs: list[list[int]] = []
    for number in layers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
