"""`contextlab advise`: the way to spend some memory on a model, its weights and its context."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from contextlab.cli.arguments import read_length, read_size
from contextlab.cli.compress import tasks_of
from contextlab.cli.shared import PARTS, JsonOption, PluginOption, console, load_components
from contextlab.cli.tables import print_table
from contextlab.errors import InputError
from contextlab.memory import LARGEST_WHOLE
from contextlab.words import bytes_in_words

if TYPE_CHECKING:
    import torch

    from contextlab.evaluation.advise import Form
    from contextlab.models import Model

WEIGHTS = ("rtn:bits=8", "rtn:bits=4")
"""Forms of the weights that are tried where none are given; they need no data."""


def advise(
    model: Annotated[
        str, typer.Argument(help="A saved model, a run, a checkpoint, a transformers folder that is imported.")
    ],
    memory: Annotated[str, typer.Option(help="For weights and states together: 64MB, 64MiB, 1.5GB.")],
    length: Annotated[str, typer.Option(help="Tokens of a sequence; k stands for 1024.")],
    batch: Annotated[int, typer.Option(min=1, max=LARGEST_WHOLE, help="Sequences held at once.")] = 1,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="MODEL", help="Another model that may take its place, such as a converted one."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            metavar="METHOD[:KEY=VALUE,...]",
            help="Make the weights smaller, as shrink does; A|B: one, then the other; none for none.",
            show_default=", ".join(WEIGHTS),
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME[:KEY=VALUE,...]",
            help="What to keep of the context; none for all of it.",
            show_default="quantize:bits=4, keydiff:window=8, both",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="Parts that policies may keep.", show_default="50%, 25%, 10%, 5%"),
    ] = None,
    task: Annotated[
        str, typer.Option(help="Tasks on tokens, by commas, on which quality is measured, as for compress.")
    ] = "needle,text",
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="FILE|TASK[:KEY=VALUE,...]", help="Text or a task on which methods are calibrated."
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="LENGTH",
            help="Tokens of the prompts on which quality is measured.",
            show_default="--length, or fewer where that takes long",
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, max=LARGEST_WHOLE, help="Prompts of each task.")] = 32,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_WHOLE, help="Of prompts and of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for what is measured, advise.json and advise.html.", show_default="advised/MODEL"),
    ] = None,
    as_json: JsonOption = False,
    plugin: PluginOption = None,
) -> None:
    """What is the best way to spend some memory on a model's weights and the states of so many sequences?

    Bytes are foretold; quality is measured of what fits, and kept in the folder, so that another question reads it.

    Examples:

      contextlab advise runs/byte-lm --memory 8MB --length 4k --batch 8 --at 512

      contextlab advise runs/byte-lm --memory 64MB --length 16k --also byte-hybrid --weights gptq --data notes.txt
    """
    size, tokens = read_size(memory, "--memory"), read_length(length, "--length")
    where = None if at is None else read_length(at, "--at")
    load_components(plugin, (*PARTS, "conversion"))
    from contextlab.convert.methods import check_data
    from contextlab.convert.variants import read_forms
    from contextlab.evaluation.advise import advise as answer
    from contextlab.evaluation.advise.answer import BUDGETS, POLICIES
    from contextlab.evaluation.advise.foretell import read_ways
    from contextlab.evaluation.compress import check_prompts
    from contextlab.experiments import find_model
    from contextlab.files import write_json
    from contextlab.models import Model
    from contextlab.places import require_place
    from contextlab.report.advice import advice_record, advice_table, advice_words, told_rows, write_advice_page
    from contextlab.training.distributed import resolve

    methods, kept = WEIGHTS if weights is None else _given(weights), POLICIES if policy is None else _given(policy)
    wanted = tasks_of(task)
    check_data(data)
    read_forms(methods, bool(data))
    read_ways(kept, budget or BUDGETS)
    for each in wanted:
        check_prompts(each)
    chosen = resolve(device)
    name, loaded, tokenizer = find_model(model, chosen, native=True)
    assert isinstance(loaded, Model)
    folder = out or Path("advised") / name
    require_place(folder)
    forms = list(_forms(loaded, methods, data, also or [], chosen, seed))
    with console.status("measuring ...") as status:
        found = answer(
            loaded, size, tokens, batch, forms=forms, policies=kept,
            budgets=budget or BUDGETS, tasks=wanted, at=where, prompts=prompts, seed=seed, name=name,
            tokenizer=tokenizer, folder=folder, progress=lambda text: status.update(escape(text)),
        )  # fmt: skip
    record = advice_record(found)
    write_json(folder / "advise.json", record)
    write_advice_page(found, folder / "advise.html")
    if as_json:
        console.print_json(data=record)
        return
    rows = advice_table(found)
    fits = [{key: cell for key, cell in row.items() if key != "left out"} for row in rows if not row["left out"]]
    others = [row for row in told_rows(rows) if row["left out"]]
    if fits:
        print_table(f"fits in {memory} ({bytes_in_words(size)})", fits)
    if others:
        shown = ("weights", "policy", "budget", "total", "left out")
        print_table("left out", [{key: row[key] for key in shown} for row in others], prose=["left out"])
    console.print(
        f"[dim]stored (weights), states, total: foretold. kept: of the model's own quality, above chance, on prompts "
        f"of {found.at:,} tokens (±: half of a 95% interval over prompts). Of each policy the largest budget that fits "
        "is measured.[/dim]"
    )
    read = len(found.fitting) - found.measured
    console.print(f"[dim]measured now: {found.measured}; read: {read}[/dim]\n")
    console.print(escape(advice_words(found)) + "\n")
    console.print(f"Figure: {folder / 'advise.html'}   Record: {folder / 'advise.json'}", soft_wrap=True)


def _given(texts: list[str]) -> list[str]:
    """What was given; nothing of the word none alone."""
    return [] if texts == ["none"] else texts


def _as_it_is_now(data: str) -> str:
    """Data as they were named and, of files, what they hold."""
    from contextlab.files import file_digest

    path, digests = Path(data), []
    with suppress(OSError, ValueError):  # no path at all, but a task
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        digests = [f"{each.relative_to(path)} {file_digest(each)}" for each in files if each.is_file()]
    return f"{data} ({hashlib.sha256(repr(digests).encode()).hexdigest()})" if digests else data


def _forms(
    loaded: Model,
    weights: list[str] | tuple[str, ...],
    data: list[str] | None,
    also: list[str],
    device: torch.device,
    seed: int,
) -> Iterator[Form]:
    """The forms of the weights, and the other models."""
    from contextlab.convert.variants import read_variants
    from contextlab.evaluation.advise.foretell import other, shrunk
    from contextlab.experiments import find_model
    from contextlab.models import Model
    from contextlab.models.digest import fingerprint

    variants = read_variants(loaded, list(weights), data, seed=seed)
    read = f"{', '.join(map(_as_it_is_now, data))} of seed {seed}" if data else f"seed {seed}"
    for each in variants:
        yield shrunk(each.text, each.spec, each.make, read)
    for source in also:
        name, made, _ = find_model(source, device, native=True)
        assert isinstance(made, Model)
        if fingerprint(made) == fingerprint(loaded):
            raise InputError(f"--also {source}: is not another model, but the model itself")
        if (made.spec.input_size, made.spec.output_size) != (loaded.spec.input_size, loaded.spec.output_size):
            raise InputError(
                f"--also {source}: has {made.spec.input_size} tokens, and the model {loaded.spec.input_size}; expected "
                "a model of the same vocabulary"
            )
        yield other(name, made, fingerprint(made))
