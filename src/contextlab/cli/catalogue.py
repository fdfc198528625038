"""`contextlab list`: what is known by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from contextlab.cli.shared import JsonOption, PluginOption, console, load_components
from contextlab.errors import InputError, unknown
from contextlab.kinds import KINDS
from contextlab.words import bytes_in_words

if TYPE_CHECKING:
    from contextlab.registry import Entry

LISTED = {**KINDS, "recipe": "recipes"}
FACTS = {"mixer": ("state", "sequence", "token"), "policy": ("needs",)}
LEGENDS = {
    "mixer": "state: how it grows with the T tokens read, and its size after 4096 of them at width 64. sequence: "
    "operations for T tokens at once, and how they are done. token: time of one more after T.",
    "policy": "needs: what it must see of a prompt besides the keys and values.",
}


def list_(
    kind: Annotated[str, typer.Argument(help=f"One of: {', '.join(LISTED.values())}.")],
    family: Annotated[str | None, typer.Option(help="Only those of this family.")] = None,
    as_json: JsonOption = False,
    plugin: PluginOption = None,
) -> None:
    """List what is known by name, family by family: mixers, tasks, policies, the report's figures and others."""
    kind = read_kind(kind)
    if kind == "recipe":
        if plugin:
            raise InputError("--plugin: recipes are files; contextlab show recipe FILE shows yours")
        rows = _recipes(family)
    else:
        load_components(plugin, (kind,))
        from contextlab import registry

        rows = [
            {"name": entry.name, "summary": entry.summary, "papers": list(entry.papers), **facts_of(entry)}
            for entry in _of_family(registry.entries(kind), kind, family)
        ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    console.print(_table(kind, rows))
    if kind in LEGENDS:
        console.print(f"[dim]{LEGENDS[kind]}[/dim]")
    console.print(f"[dim]contextlab show {kind} NAME tells more.[/dim]")


def read_kind(kind: str) -> str:
    """mixers -> mixer. Raises InputError with the nearest kind."""
    chosen = {plural: singular for singular, plural in LISTED.items()}.get(kind, kind)
    if chosen not in LISTED:
        raise InputError(unknown("kind", kind, LISTED.values()))
    return chosen


def facts_of(entry: Entry) -> dict[str, Any]:
    """What is told of a component beside its name, papers and docstring: its family, and what a kind has of its own."""
    facts = {"family": entry.family or "other"}
    if entry.kind == "mixer":
        return {**facts, **_mixer_facts(entry)}
    return {**facts, "needs": _needs(entry)} if entry.kind == "policy" else facts


def _recipes(family: str | None) -> list[dict[str, Any]]:
    from contextlab.experiments import recipes

    if family is not None:
        raise InputError("--family: recipes have none")
    return [{"name": recipe.name, "summary": recipe.description} for recipe in recipes()]


def _of_family(entries: list[Entry], kind: str, family: str | None) -> list[Entry]:
    """Those of one family, or all. Raises InputError with the nearest family."""
    if family is None:
        return entries
    found = [entry for entry in entries if (entry.family or "other") == family]
    if not found:
        known = sorted({entry.family or "other" for entry in entries})
        raise InputError(f"--family: {unknown(f'family of {KINDS[kind]}', family, known)}")
    return found


def _mixer_facts(entry: Entry) -> dict[str, Any]:
    """A mixer's parallel form and what it costs, with default options at width 64."""
    from contextlab.mixers import base

    factory: Any = entry.factory
    facts: dict[str, Any] = {"parallel_form": factory.parallel_form}
    costs = dict.fromkeys(("state_growth", "state_bytes", "sequence_cost", "token_cost"))
    if set(entry.required) - {"width"}:
        return {**facts, **costs, "sequence_cost": "?", "token_cost": "?"}
    mixer = factory(width=64)  # not by `entry.build`: there are no options to check, which takes longer than to build
    return {
        **facts,
        "state_growth": base.state_growth(mixer),
        "state_bytes": mixer.state_nbytes(4096) if mixer.causal else 0,
        "sequence_cost": base.sequence_cost(mixer),
        "token_cost": base.token_cost(mixer),
    }


def _needs(entry: Entry) -> str:
    """What a policy needs, with default options."""
    return "?" if entry.required else entry.factory().needs or "nothing"


def _table(kind: str, rows: list[dict[str, Any]]) -> Table:
    """A heading for each family, and under it a row for each component."""
    facts = FACTS.get(kind, ())
    wide = not facts or console.width >= 150  # a narrow terminal shows the facts first
    papers = kind != "recipe" and (not facts or console.width >= 100)
    most = None if console.width >= (150 if facts else 120) else 1  # papers of each
    table = Table(box=None, padding=(0, 2 if papers or not facts else 1, 0, 0), pad_edge=False)
    table.add_column("name", style="cyan", no_wrap=True)
    if wide:
        table.add_column("what it is")
    for fact in facts:
        table.add_column(fact, no_wrap=fact != "needs")  # a sentence, where the others are words
    if papers:
        table.add_column("papers (arXiv)", style="dim")
    before = None
    for row in sorted(rows, key=lambda row: (row.get("family", ""), row["name"])):
        if row.get("family") != before:
            if before is not None:
                table.add_row()
            before = row["family"]
            table.add_row(f"[bold white]{escape(before)}[/]")
        cells = [row["name"], *([row["summary"]] if wide else []), *_cells(kind, row)]
        if papers:
            cells.append(_papers(row["papers"], most))
        table.add_row(*map(escape, cells))
    return table


def _cells(kind: str, row: dict[str, Any]) -> Iterable[str]:
    """What stands under the FACTS of a kind."""
    if kind == "policy":
        return [row["needs"]]
    if kind != "mixer":
        return []
    size = row["state_bytes"]
    state = "?" if size is None else "none" if size == 0 else f"{row['state_growth']}, {bytes_in_words(size)}"
    return [state, f"{row['sequence_cost']} ({row['parallel_form']})", row["token_cost"]]


def _papers(papers: list[str], most: int | None) -> str:
    return ", ".join([*papers[:most], *(["..."] if most is not None and len(papers) > most else [])])
