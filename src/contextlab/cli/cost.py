"""`contextlab cost`: what context costs a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contextlab.cli.arguments import read_lengths
from contextlab.cli.shared import JsonOption, PluginOption, SetOption, console, load_components
from contextlab.cli.tables import print_table
from contextlab.errors import InputError
from contextlab.memory import LARGEST_WHOLE
from contextlab.words import bytes_in_words

if TYPE_CHECKING:
    from contextlab.models import HuggingFaceSpec, ModelSpec


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
    from contextlab.files import present
    from contextlab.places import require_place
    from contextlab.report import write_cost_figure
    from contextlab.training.distributed import resolve

    load_components(plugin)
    spec = model_spec(model, changes or [])
    name = Path(model).stem if present(Path(model)) else model
    sizes = read_lengths(lengths)
    folder = out or Path("costs") / name
    require_place(folder)
    chosen = resolve(device)
    with console.status(f"measuring {name} at {', '.join(map(str, sizes))} tokens"):
        results = measure(spec, sizes, batch=batch, repeats=repeats, device=chosen, name=name, plugins=plugin or [])
    write_results(results, folder / "cost.parquet")
    write_cost_figure(results, folder / "cost.html")
    if as_json:
        print(results.to_json(orient="records", indent=2))
        return
    _print_costs(results, name)
    console.print(f"Figure: {folder / 'cost.html'}   Table: {folder / 'cost.parquet'}", soft_wrap=True)


def model_spec(model: str, changes: list[str]) -> ModelSpec | HuggingFaceSpec:
    """The spec of a preset's name, a YAML file, a saved model or a Hugging Face checkpoint.

    Token sizes are filled in where none are given.
    """
    from contextlab.experiments.recipes import read_yaml, set_key
    from contextlab.files import present
    from contextlab.models import preset
    from contextlab.models.io import read_description

    data: dict[str, Any] = {}
    path = Path(model)
    if present(path) and path.is_dir():
        if not (path / "model.json").exists() and (path / "config.json").exists():
            if changes:
                raise InputError("--set changes contextlab's own specs; a Hugging Face checkpoint cannot be changed")
            from contextlab.models.hub import describe_checkpoint

            return describe_checkpoint(path)
        if not (path / "model.json").exists():
            raise InputError(f"{path}: no saved model there (expected model.json, or a checkpoint's config.json)")
        from contextlab.experiments.made_with import naming_plugins

        with naming_plugins(path):
            return _with_sizes(_parsed(read_description(path)[0], changes))
    elif present(path) or path.suffix in (".yaml", ".yml"):
        data = read_yaml(path)
    if data:
        spec = _parsed(data, changes)
    else:
        options: dict[str, Any] = {}
        for change in changes:
            set_key(options, change)
        spec = preset(model, **options)
    return _with_sizes(spec)


def _parsed(data: dict[str, Any], changes: list[str]) -> ModelSpec:
    from contextlab.experiments.recipes import set_key
    from contextlab.models import ModelSpec

    for change in changes:
        set_key(data, change)
    return ModelSpec.parse(data)


def _with_sizes(spec: ModelSpec) -> ModelSpec:
    """The spec, of tokens where it gives no sizes."""
    if spec.input_size is not None and spec.output_size is not None:
        return spec
    return type(spec).parse({**spec.model_dump(), "read_in": "token", "input_size": 256, "output_size": 256})


def _print_costs(results: Any, name: str) -> None:
    wide = results.pivot_table(index="length", columns="metric", values="value", observed=True)
    formats = {
        "parameters": ("parameters", lambda v: f"{int(v):,}"),
        "flops": ("GFLOP", lambda v: f"{v / 1e9:.3g}"),
        "state_bytes": ("state", lambda v: bytes_in_words(v)),
        "prefill_seconds": ("prefill", lambda v: f"{v * 1e3:.3g} ms"),
        "decode_seconds_per_token": ("decode / token", lambda v: f"{v * 1e3:.3g} ms"),
        "peak_bytes": ("peak memory", lambda v: bytes_in_words(v)),
    }
    shown = [metric for metric in formats if metric in wide]
    rows = [
        {"tokens": f"{length:,}", **{formats[m][0]: formats[m][1](row[m]) if row[m] == row[m] else "-" for m in shown}}
        for length, row in wide.iterrows()
    ]
    print_table(name, rows)
