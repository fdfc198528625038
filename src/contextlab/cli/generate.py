"""`contextlab generate`: a trained model writes on."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from contextlab.cli.shared import JsonOption, PluginOption, console, load_components
from contextlab.cli.tables import print_table
from contextlab.errors import InputError
from contextlab.memory import LARGEST_WHOLE
from contextlab.words import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from contextlab.evaluation import DraftTimed
    from contextlab.models import DraftSpec, Model

SHOWN = 64
"""Tokens of a prompt that are shown, the last ones."""
PROMPTS, SECONDS = 4, 1.0
"""What is drawn of --data, and how long a draft is timed, unless told."""


def generate(
    model: Annotated[
        str,
        typer.Argument(help="A saved model, a run with one trained model, a checkpoint, a transformers folder."),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="To write on; may be given many times.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="FILE|TASK[:KEY=VALUE,...]", help="Text or a task to draw prompts of, not --prompt."
        ),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_WHOLE, help="Drawn of --data.", show_default=str(PROMPTS))
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=LARGEST_WHOLE, help="To write after each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="Of the draw of each token; 0 takes the likeliest.")] = 0.0,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            "--draft",
            metavar="layers=E[,ahead=D]",
            help="Draft D tokens by the first E layers, check them by all, and time this beside plain decoding; "
            "may be given many times.",
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--time", min=0, help="Seconds to time each draft.", show_default=str(SECONDS))
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_WHOLE, help="Of the prompts and of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonOption = False,
    plugin: PluginOption = None,
) -> None:
    """Write on from prompts, by the likeliest tokens or by drawn ones; with --draft, by a model that drafts for itself.

    Examples:

      contextlab generate runs/byte-lm --prompt 'import '

      contextlab generate runs/byte-lm --data notes.txt --draft layers=1 --draft layers=2,ahead=6
    """
    from contextlab.convert.methods import check_data
    from contextlab.evaluation import time_drafts
    from contextlab.experiments import find_model
    from contextlab.models import Model
    from contextlab.models.drafting import check_draft
    from contextlab.training.distributed import resolve, seeded

    load_components(plugin)
    if bool(prompt) == (data is not None):
        raise InputError("generate: expected --prompt TEXT or --data FILE|TASK, one of the two")
    if draft and temperature:
        raise InputError("--draft: drafted tokens are the likeliest ones; leave out --temperature or --draft")
    if prompts is not None and data is None:
        raise InputError("--prompts: are drawn of --data; leave it out, or give --data in the place of --prompt")
    if seconds is not None and not draft:
        raise InputError("--time: is how long a draft is timed; leave it out, or give --draft layers=E")
    drafts = [_draft(each) for each in draft or ()]
    check_data([data] if data else None)
    chosen = resolve(device)
    _, loaded, tokenizer = find_model(model, chosen, native=True)
    assert isinstance(loaded, Model)
    if loaded.spec.read_in != "token":
        raise InputError("generate: this model reads vectors; only a model that reads tokens can generate")
    rows, read = _texts(prompt, tokenizer, loaded) if prompt else _drawn(str(data), prompts or PROMPTS, seed, loaded)
    for each in drafts:
        check_draft(loaded, each)
    rows = [row.to(chosen) for row in rows]
    _require_room(loaded, rows, tokens)
    told = time_drafts(loaded, rows, max(2, tokens), drafts, seconds=SECONDS if seconds is None else seconds)
    written = []
    for place, row in enumerate(rows):
        draws = seeded("generate", seed, place, device=chosen)
        written.append(loaded.generate(row[None], tokens, temperature=temperature, generator=draws)[0])
    if as_json:
        found = [
            {"prompt": row.tolist(), "written": ids.tolist(), "text": read(ids.tolist())}
            for row, ids in zip(rows, written, strict=True)
        ]
        print(json.dumps({"prompts": found, "drafts": [dataclasses.asdict(each) for each in told]}, indent=2))
        return
    for row, ids in zip(rows, written, strict=True):
        seen = row[-SHOWN:].tolist()
        before, whole = read(seen), read([*seen, *ids.tolist()])
        # Read together, so that what stands between two tokens, such as a space, stands here, too.
        after = whole[len(before) :] if whole.startswith(before) else read(ids.tolist())
        shown = ("..." if len(row) > SHOWN else "") + before
        console.print(Text(_plain(shown), style="dim") + Text(_plain(after), style="not dim bold"))
        console.print()
    _show(told)


def _draft(text: str) -> DraftSpec:
    """`layers=2,ahead=6`."""
    from contextlab.models import DraftSpec
    from contextlab.policies.core.parse import parse_options

    if "=" not in text:
        raise InputError(f"--draft: expected layers=E or layers=E,ahead=D, such as layers=2, got {text[:60]!r}")
    return DraftSpec.parse(parse_options(f"draft:{text}", "--draft")[1], "--draft")


def _texts(texts: list[str], tokenizer: Any, model: Model) -> tuple[list[Tensor], Callable[[Sequence[int]], str]]:
    """The tokens [T] of texts, and what makes text of tokens: the model's tokenizer, or bytes."""
    import torch

    from contextlab.tasks.text.codec import codec

    found = codec(tokenizer)
    if found.size > (model.spec.input_size or 0):
        raise InputError(
            f"--prompt: the model has {model.spec.input_size} tokens, which cannot be the {found.size} of "
            f"{'bytes' if found.is_bytes else 'its tokenizer'}; give --data TASK, what it was trained on"
        )
    rows = [torch.tensor(found.encode(text), dtype=torch.int64) for text in texts]
    if not all(map(len, rows)):
        raise InputError("--prompt: expected a text of at least one token, got ''")
    return rows, found.decode


def _drawn(data: str, count: int, seed: int, model: Model) -> tuple[list[Tensor], Callable[[Sequence[int]], str]]:
    """Prompts [T] of a task, which no training or evaluation draws, and what makes text of its tokens."""
    from contextlab.convert.methods import read_data
    from contextlab.training.distributed import seeded

    task: Any = read_data(data, model)
    return list(task.sample(count, seeded("generate", seed)).inputs), task.text


def _require_room(model: Model, rows: Sequence[Tensor], tokens: int) -> None:
    """Refuse what is longer than a model reads. Raises InputError."""
    longest, most = max(map(len, rows)), model.spec.max_length
    if model.spec.position == "learned" and most is not None and longest + tokens - 1 > most:
        fits = f"--tokens {most - longest + 1}" if longest <= most else f"--data TASK:length={most // 2}"
        raise InputError(
            f"generate: {counted(longest, 'token')} and {tokens:,} more are too many for a model of {most} positions; "
            f"give fewer, such as {fits}"
        )


def _plain(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text)


def _show(told: Sequence[DraftTimed]) -> None:
    rows = [
        {
            "layers": str(each.layers), "ahead": str(each.ahead), "accepted": f"{each.acceptance:.1%}",
            "tokens a pass": f"{each.per_pass:.2f}", "plain": f"{each.plain[1] * 1e3:.3g} ms",
            "drafted": f"{each.drafted[1] * 1e3:.3g} ms",
            "times as long": f"{each.ratio[1]:.3g} ({each.ratio[0]:.3g} to {each.ratio[2]:.3g})",
            "same tokens": f"{each.same:.1%}",
        }
        for each in told
    ]  # fmt: skip
    if rows:
        print_table("", rows)
        turns = ", ".join(dict.fromkeys(str(each.turns) for each in told))
        console.print(
            f"[dim]Times are a token's, medians of {turns} turns in this process, and the ratios' quartiles. Plain "
            "decoding gives one token a pass.[/dim]"
        )
