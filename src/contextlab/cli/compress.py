"""`contextlab compress`: what is lost, and won, when policies keep a part of the context."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from contextlab.cli.arguments import read_lengths
from contextlab.cli.shared import PARTS, JsonOption, PluginOption, console, load_components
from contextlab.cli.tables import print_table
from contextlab.errors import InputError
from contextlab.memory import LARGEST_WHOLE
from contextlab.words import counted

if TYPE_CHECKING:
    from contextlab.models import Model


def compress(
    model: Annotated[
        str, typer.Argument(help="A run's or a checkpoint's folder, a saved model, a Hugging Face folder or hub name.")
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", metavar="NAME[:KEY=VALUE,...]", help="What to keep; may be given many times. A|B combines two."
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="How much of it: 10%, 512tok or 64MB (a sequence); may be given many times."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            metavar="METHOD[:KEY=VALUE,...]",
            help="Measure the weights made smaller, too, as shrink does; may be given many times. A|B: one, then the "
            "other.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="FILE|TASK[:KEY=VALUE,...]", help="Text or a task on which such methods are calibrated."
        ),
    ] = None,
    sequences: Annotated[
        int, typer.Option(min=1, max=LARGEST_WHOLE, help="Sequences held at once, in the total of bytes.")
    ] = 1,
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
    as_json: JsonOption = False,
    plugin: PluginOption = None,
) -> None:
    """What does a model lose, and win, when policies keep a part of its context, or its weights are made smaller?

    Examples:

      contextlab compress runs/byte-lm --policy snapkv:window=8 --policy h2o:window=8 --budget 10% --budget 25%

      contextlab compress runs/byte-lm --policy 'tova|quantize:bits=4' --budget 192kB --task text --lengths 512,1k

      contextlab compress runs/byte-lm --weights rtn:bits=8 --weights rotate:bits=4 --policy keydiff --budget 25%
    """
    from contextlab.evaluation import write_results
    from contextlab.evaluation.compress import build_prompts, check_prompts, check_settings, takes_budgets
    from contextlab.evaluation.compress import compress as measure
    from contextlab.evaluation.results import COMPRESS_COLUMNS
    from contextlab.experiments import find_model
    from contextlab.models import Model
    from contextlab.places import require_place
    from contextlab.report import compress_table, compress_words, weights_words, write_compress_page
    from contextlab.training.distributed import resolve

    load_components(plugin, (*PARTS, "conversion") if weights else PARTS)
    if not policy and not weights:
        raise InputError("compress: expected --policy NAME, such as snapkv, or --weights METHOD, such as rtn:bits=8")
    if data and not weights:
        raise InputError("--data: is what --weights METHOD is calibrated on; give such a method, or leave it out")
    wanted, sizes = tasks_of(task), read_lengths(lengths)
    if budget and not policy:
        raise InputError("--budget: is what a --policy keeps; give one, such as snapkv, or leave the budget out")
    if not skip:
        check_settings(policy or [], budget or [])
        if budget and not takes_budgets(policy or []):
            raise InputError(f"--budget: {', '.join(policy or [])} takes none; leave it out")
        for each in wanted:
            check_prompts(each)
    if weights:
        _check(weights, data)
    chosen = resolve(device)
    name, loaded, tokenizer = find_model(model, chosen, native=bool(weights))
    folder = out or Path("compressed") / name
    require_place(folder)
    others = {label: other for label, other, _ in (find_model(each, chosen) for each in compare or [])}
    left_out: list[str] | None = [] if skip else None
    if name in others or len(others) < len(compare or []):
        raise InputError("--compare: two models have the same name; give folders with different names")
    made: dict[str, Model] = {}
    if weights:
        assert isinstance(loaded, Model)
        for each, n in itertools.product(wanted, sizes):
            build_prompts(each, n, loaded, tokenizer)  # what is wrong with one is said before anything is made
        made = _made(loaded, weights, data, seed)
    with console.status("measuring ...") as status:
        results = measure(
            loaded, policy or [], budget or [], wanted, sizes, prompts=prompts, batch=batch,
            seed=seed, name=name, tokenizer=tokenizer, compare=others, decoded=decoded, fit=fit, left_out=left_out,
            progress=lambda text: status.update(escape(text)), weights=made, sequences=sequences,
        )  # fmt: skip
    write_results(results, folder / "results.parquet", COMPRESS_COLUMNS)
    write_compress_page(results, folder / "compress.html", left_out or ())
    if as_json:
        print(results.drop(columns=["values"]).to_json(orient="records", indent=2))
        return
    for title, rows in compress_table(results).items():
        print_table(title, rows)
    for sentence in [*compress_words(results), *weights_words(results)]:
        console.print(f"• {escape(sentence)}")
    if named := list(dict.fromkeys(results["tokenizer"].dropna())):
        console.print(f"[dim]tokenizer of text: {escape(', '.join(named))}[/dim]", soft_wrap=True)
    for line in left_out or ():
        console.print(f"[dim]left out: {escape(line)}[/dim]", soft_wrap=True)
    console.print(
        "[dim]state: bytes of one sequence. decode, prefill: times as fast as the full cache on the same prompts "
        "(least-most of the batches; nothing of one batch: a smaller --batch makes more). KL: of the full cache's "
        "predictions to these, nats.[/dim]"
    )
    if made:
        held = counted(sequences, "sequence")
        console.print(f"[dim]stored: bytes of the weights. total: of these and of the states of {held}.[/dim]")
    console.print(f"Figure: {folder / 'compress.html'}   Table: {folder / 'results.parquet'}", soft_wrap=True)


def _check(weights: list[str], data: list[str] | None) -> None:
    """Refuse methods and data by their names and options. Raises InputError."""
    from contextlab.convert.methods import check_data
    from contextlab.convert.variants import read_forms

    check_data(data)
    read_forms(weights, bool(data))


def _made(model: Model, weights: list[str], data: list[str] | None, seed: int) -> dict[str, Model]:
    """Each form of the weights as it was written, and the model with it."""
    from contextlab.convert.variants import read_variants

    found = {}
    with console.status("making weights smaller ...") as status:
        for each in read_variants(model, weights, data, seed=seed):
            status.update(escape(f"making {each.text}"))
            found[each.text] = each.make()
    return found


def tasks_of(text: str) -> list[str]:
    """needle:depth=0.5,text -> the two; commas before an option belong to the task before."""
    found: list[str] = []
    for part in text.split(","):
        if found and ":" in found[-1] and re.match(r"\s*\w+\s*=", part):
            found[-1] += f",{part}"
        else:
            found.append(part.strip())
    return list(dict.fromkeys(found))
