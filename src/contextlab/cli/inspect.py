"""`contextlab inspect`: looking inside models: their places, and what probes find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from contextlab.cli.shared import PARTS, JsonOption, PluginOption, console, load_components
from contextlab.cli.tables import print_table
from contextlab.errors import InputError, nearest, unknown
from contextlab.memory import LARGEST_WHOLE

if TYPE_CHECKING:
    from collections.abc import Sequence


def inspect_(
    model: Annotated[
        str,
        typer.Argument(
            help="A run, RUN:MODEL, a saved model, a checkpoint, a transformers folder; for --sites a preset, too."
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="On whose prompts: of a run one of its tasks, else a registered one.",
            show_default="all of the run",
        ),
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(
            "--probe",
            metavar="NAME[:KEY=VALUE,...]",
            help="What is measured; may be given many times.",
            show_default="all that apply",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_WHOLE, help="Of the prompts.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for inspect.parquet and inspect.html.", show_default="inspected/MODEL")
    ] = None,
    html: Annotated[
        bool, typer.Option("--html", help="Add maps to the page: point at a token, and see which ones it looks at.")
    ] = False,
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
    """What happens inside a trained model, in any mixer? Puts probes to it and answers in words, figures and a table.

    Examples:

      contextlab inspect runs/demo --task recall --html

      contextlab inspect runs/demo:transformer --task regression --probe linear:what=weights

      contextlab inspect gated_delta_net --sites
    """
    load_components(plugin, (*PARTS, "probe"))
    if sites:
        for name, given in (("--task", task), ("--probe", probe), ("--out", out), ("--html", html)):
            if given:
                raise InputError(f"{name}: --sites lists places and measures nothing; leave one of them out")
        _list_sites(model, only, as_json)
        return
    if only:
        raise InputError("--only: is of --sites, which lists places; give --sites, too, or leave it out")
    _look(model, task, probe, seed, device, out, html, as_json)


def _look(
    model: str, task: str | None, probes: list[str] | None, seed: int, device: str, out: Path | None, html: bool,
    as_json: bool,
) -> None:  # fmt: skip
    from contextlab.experiments.subjects import find_subjects
    from contextlab.inspect.looking import Looked, named_probes, write_looked
    from contextlab.inspect.viewing import Viewed
    from contextlab.places import require_place
    from contextlab.report.looked import write_looked_page
    from contextlab.report.maps import looked_maps
    from contextlab.training.distributed import resolve

    named_probes(probes)
    _require_weights(model)
    subjects = find_subjects(model, task, resolve(device))
    folder = out or Path("inspected") / Path(model).name.replace(":", "-")
    require_place(folder)
    parts, views = [], dict[tuple[str, str], Viewed]()
    with console.status("looking ...") as status:
        for each in subjects:
            at = each.title

            def progress(text: str, at: str = at) -> None:
                status.update(escape(f"{at}: {text} ..."))

            parts.append(each.look(probes, seed, progress, skip=len(subjects) > 1))
            if html and (each.task_name, each.model) not in views:  # of several trainings the first is shown
                progress("maps")
                views[each.task_name, each.model] = each.view(seed)
    found = Looked.join(parts)
    if found.table.empty:
        raise InputError(f"inspect: no probe could be put to it: {found.reasons[0]}")
    write_looked(found.table, folder / "inspect.parquet")
    maps = looked_maps(list(views.values())) if views else ""
    page = write_looked_page(found, folder / "inspect.html", f"Inside {Path(model).name}", maps=maps)
    if as_json:
        print(found.table.to_json(orient="records", indent=2))
        return
    for sentence in found.words:
        console.print(f"• {escape(sentence)}")
    for line in found.reasons:
        console.print(f"[dim]left out: {escape(line)}[/dim]", soft_wrap=True)
    console.print("[dim]Brackets: 95% intervals. Control: the same where there is nothing to be found.[/dim]")
    console.print(f"Figures: {page}   Table: {folder / 'inspect.parquet'}", soft_wrap=True)


def _require_weights(name: str) -> None:
    """Raises InputError of a preset, which has none that were trained."""
    from contextlab import registry
    from contextlab.files import present

    if not present(Path(name)) and name in registry.names("model"):
        raise InputError(
            f"{name}: is a preset, whose weights are not trained; give a run, a saved model, or --sites for its places"
        )


def _list_sites(model: str, only: list[str] | None, as_json: bool) -> None:
    from contextlab.inspect import listing

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
