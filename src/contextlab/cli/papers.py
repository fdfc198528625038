"""`contextlab papers`: the index of the literature, and how to look something up in it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.text import Text

from contextlab.cli.shared import JsonOption, console
from contextlab.cli.tables import print_table

if TYPE_CHECKING:
    from contextlab.papers import Paper

STATUS = "reproduced, contradicted, implemented, partly, planned or out of scope"
"""What `papers.STATUSES` has; the index itself is read by the commands that need it, not by every start."""
DECIDED = {"holds": "it holds", "fails": "it fails", "unclear": "unclear"}

AreaOption = Annotated[str | None, typer.Option(help="Only those of this area.", metavar="AREA", show_default=False)]
SinceOption = Annotated[
    int | None, typer.Option(help="Only those of this year or later.", metavar="YEAR", show_default=False)
]
WhichArgument = Annotated[
    str, typer.Argument(metavar="ID", help="An arXiv id or address, a name or a title.", show_default=False)
]


def list_papers(
    ctx: typer.Context,
    area: AreaOption = None,
    status: Annotated[
        str | None,
        typer.Option(help=f"Only those that are {STATUS}.", metavar="STATUS", show_default=False),
    ] = None,
    since: SinceOption = None,
    as_json: JsonOption = False,
) -> None:
    """The papers that the library grew from or cites: what each adds and claims, and what of it runs here.

    Examples:

      contextlab papers --area kv-cache --status implemented

      contextlab papers search 'evict kv cache while decoding'

      contextlab papers show 2404.14469
    """
    if ctx.invoked_subcommand is not None:
        return
    from contextlab.papers import papers

    found = papers(area=area, status=status, since=since)
    if as_json:
        print(json.dumps([each.told() for each in found], indent=2, ensure_ascii=False))
        return
    if area is None and status is None and since is None:
        _print_areas()
        return
    if not found:
        console.print("No paper of the index is such.")
        return
    _print_papers(found)


def search(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Words to look for.", show_default=False)],
    most: Annotated[int, typer.Option("--most", min=1, max=500, help="Papers to show.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Look for papers by words of their names, titles, contributions and claims, the best fit first.

    A word that no paper has is read as the nearest that some paper has.

    Example:

      contextlab papers search 'evict kv cache while decoding'
    """
    from contextlab.papers import search as search_papers

    found = search_papers(text, most=most)
    if as_json:
        rows = [{**hit.paper.told(), "score": round(hit.score, 3)} for hit in found.hits]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for word, meant in found.read_as.items():
        console.print(f"[dim]no paper has {escape(repr(word))}: read as {escape(repr(meant))}[/dim]")
    if not found.hits:
        console.print(f"No paper has a word of {escape(repr(text))}.")
        return
    _print_papers([hit.paper for hit in found.hits])


def show(which: WhichArgument, as_json: JsonOption = False) -> None:
    """Tell what a paper adds and claims, whether it runs here, and what to run.

    Example:

      contextlab papers show 2404.14469
    """
    from contextlab.papers import STATUSES, find, in_words, verdicts_of

    paper = find(which)
    if as_json:
        print(json.dumps(paper.told(), indent=2, ensure_ascii=False))
        return
    console.print(Text(paper.title, style="bold"), soft_wrap=False)
    authors = paper.authors.replace(" and others", " et al.").replace(" and ", ", ")
    console.print(f"{escape(authors)}, {paper.year}. {paper.url}\n", highlight=False)
    console.print(escape(paper.contributes), highlight=False)
    console.print(f"\nClaim: {escape(paper.claim)}", highlight=False)
    why = paper.missing or paper.reason
    console.print(f"\nHere: {paper.status}, {STATUSES[paper.status]}.", highlight=False)
    if why:
        console.print(f"{'Missing' if paper.missing else 'Reason'}: {escape(why)}", highlight=False)
    tested = verdicts_of(paper.id)
    for verdict in tested:
        console.print(f"\nTested here: {DECIDED[verdict['verdict']]}.", highlight=False)
        for each in verdict["outcomes"]:
            told = in_words(each)
            console.print(f"  {escape(each['said'])}: {told['found']} ({told['interval']}), asked {told['asked']}")
    if paper.commands:
        console.print("\nWhat to run:\n")
        for command in (*(f"contextlab claims run {each['name']}" for each in tested), *paper.commands):
            console.print(f"  {command}", style="green", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n[dim]Area: {paper.area}. contextlab papers digest --area {paper.area} explains it.[/dim]")


def cite(which: WhichArgument) -> None:
    """Print a paper's BibTeX entry.

    Example:

      contextlab papers cite 2404.14469 >> references.bib
    """
    from contextlab.papers import bibtex, find

    print(bibtex(find(which)))


def write_digest(
    area: Annotated[str, typer.Option(metavar="AREA", help="An area of the index.", show_default=False)],
    since: SinceOption = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default the terminal.", metavar="FILE", show_default=False)
    ] = None,
) -> None:
    """Write a page in Markdown that explains the ideas of an area in order, with what to run.

    Example:

      contextlab papers digest --area kv-cache --since 2024
    """
    from contextlab.files import write_atomic
    from contextlab.papers import digest
    from contextlab.places import require_free

    if out is not None:
        require_free(out)
    text = digest(area, since=since)
    if out is None:
        print(text, end="")
        return
    write_atomic(out, text)
    console.print(f"Written: {escape(str(out))}")


def _print_areas() -> None:
    """The areas, and how many papers of each have which status."""
    from contextlab.papers import STATUSES, areas, papers

    rows = []
    for area in areas():
        counts = {status: sum(each.status == status for each in area.papers) for status in STATUSES}
        rows.append(
            {"area": area.name, "papers": str(len(area.papers))}
            | {status: str(count or "-") for status, count in counts.items()}
        )
    total = {"area": "all", "papers": str(len(papers()))}
    total |= {status: str(len(papers(status=status)) or "-") for status in STATUSES}
    print_table("", [*rows, total])
    console.print("[dim]contextlab papers --area AREA lists its papers; papers search TEXT looks for words.[/dim]")


def _print_papers(found: list[Paper]) -> None:
    """Papers as a table."""
    rows = [
        {
            "id": each.id,
            "name": each.name,
            "year": str(each.year),
            "status": each.status,
            "what it adds": each.contributes,
        }
        for each in found
    ]
    print_table(
        "",
        rows,
        prose=["what it adds"],
        optional=["year"],
        see="contextlab papers show ID has it, as --json and a wider terminal.",
    )
    console.print("[dim]contextlab papers show ID tells more.[/dim]")


PAPERS = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")
PAPERS.callback(help=escape(inspect.getdoc(list_papers) or ""))(list_papers)
for _command, _name in ((search, "search"), (show, "show"), (cite, "cite"), (write_digest, "digest")):
    PAPERS.command(_name, help=escape(inspect.getdoc(_command) or ""))(_command)
