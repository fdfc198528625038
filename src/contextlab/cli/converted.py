"""What the commands that make one model of another do at their end: time both, save, and say so."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from contextlab.cli.shared import console
from contextlab.cli.tables import print_table
from contextlab.errors import InputError
from contextlab.memory import LARGEST_WHOLE
from contextlab.words import bytes_in_words

if TYPE_CHECKING:
    from contextlab.convert.conversion import Transferred
    from contextlab.convert.divergence import Compared
    from contextlab.convert.shrink import Shrunk
    from contextlab.evaluation.cost_pair import Timed
    from contextlab.models import Model

TimeOption = Annotated[
    int,
    typer.Option(
        "--time",
        min=0,
        max=LARGEST_WHOLE,
        metavar="TOKENS",
        help="Context at which both models are timed, in turns, for about a second; 0 leaves it out.",
    ),
]
TransformersOption = Annotated[
    bool | None,
    typer.Option(
        "--transformers/--no-transformers",
        help="Write it in transformers' form, too, into the folder transformers.",
        show_default="where the model came in it",
    ),
]
TIMED = 256
"""Tokens of context at which models are timed."""


def finish(
    found: Transferred | Shrunk,
    out: Path,
    before: Model,
    made_of: str,
    length: int,
    transformers: bool | None,
    aside: Path | None = None,
    **more: Any,
) -> None:
    """Save what was found, time the model before and after, add the times to the record, and say all.

    made_of: the model before, as it was named. length: of the context; 0 times nothing. transformers: whether
        to write that form, too; None: where that is or has one. aside: what is removed
        once the model is saved. more: further keys of the record.

    Raises InputError, at the end, where that form was asked for and the weights have no place in it.
    """
    from contextlab.evaluation.cost_pair import time_pair
    from contextlab.files import read_record, write_record
    from contextlab.models.exports import THEIRS, origin_of

    origin = None if transformers is False else origin_of(made_of)
    wanted = origin or bool(transformers)
    found.save(out, transformers=wanted, times=[], **more)  # first of all, so that nothing that follows can lose it
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
    if length and (times := time_pair(before, found.model, length)):
        told = {"times": [dataclasses.asdict(each) for each in times]}
        write_record(out / found.file, {**read_record(out / found.file), **told})
        show_times(times)
    form: dict[str, str] = {} if wanted is False else read_record(out / found.file)["transformers"]
    if form and not (transformers and "why_not" in form):
        show_transformers(form, out / THEIRS)
    console.print(f"Model and record: {out}", soft_wrap=True)
    if transformers and "why_not" in form:
        raise InputError(f"transformers: not written in that form, as {form['why_not']}; our own form is in {out}")


def require_time(model: Model, length: int) -> None:
    """Refuse, before any work, a context that cannot be timed. Raises ResourceError."""
    from contextlab.memory import require_bytes
    from contextlab.models.room import require_room_for_tokens

    if length and not model.spec.reads_whole:
        require_room_for_tokens(model.spec, length)
        require_bytes(f"--time {length}: the state of so many tokens", model.state_nbytes(length), "give fewer")


def title_of(method: str, options: Mapping[str, Any]) -> str:
    """A method as a user would type it."""
    from contextlab.policies.core.parse import write_options

    return f"{method}:{write_options(options)}" if options else method


def show_times(times: Sequence[Timed]) -> None:
    """A row for prefill and one for decoding."""
    rows = [
        {
            "time": f"prefill of {each.length:,} tokens" if each.what == "prefill" else "decode of a token after them",
            "before": _milliseconds(each.before[1]), "after": _milliseconds(each.after[1]),
            "times as long": f"{each.ratio[1]:.3g} ({each.ratio[0]:.3g} to {each.ratio[2]:.3g})",
        }
        for each in times
    ]  # fmt: skip
    if rows:
        print_table("", rows)
        turns = times[0].turns
        console.print(f"[dim]Time: medians of {turns} turns in this process, and the ratios' quartiles.[/dim]")


def show_transformers(told: Mapping[str, str], folder: Path) -> None:
    """That transformers' form was written, and where, or why not."""
    if "architecture" in told:
        console.print(f"For transformers, as {told['architecture']}: {folder}", soft_wrap=True)
    else:
        console.print(f"Not written for transformers: {escape(told['why_not'])}", soft_wrap=True)


def show_compared(compared: Sequence[Compared]) -> None:
    """How the model answered before and after, a row for each task, and what the columns are."""
    if compared:
        print_table("the model before and after", [_compared(each) for each in compared])
        console.print(
            "[dim]KL: of the old model's predictions to the new one's, nats; top-1: where both think the same token "
            "likeliest. Prompts that nothing was trained or calibrated on.[/dim]\n"
        )


def _compared(each: Compared) -> dict[str, str]:
    agreement = "-" if math.isnan(each.agreement) else f"{each.agreement:.1%}"
    return {
        "task": each.task, "metric": each.metric, "before": f"{each.before:.4g}", "after": f"{each.after:.4g}",
        "KL": f"{each.divergence:.4g}", "top-1": agreement,
    }  # fmt: skip


def show_bytes(sizes: Mapping[str, tuple[int, int]]) -> None:
    """What each thing takes before and after, a row for each."""
    rows = [
        {
            "bytes": name, "before": bytes_in_words(before), "after": bytes_in_words(after),
            "share": f"{after / max(1, before):.1%}",
        }
        for name, (before, after) in sizes.items()
    ]  # fmt: skip
    print_table("", rows)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
