"""`contextlab list`: what is known by name."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from contextlab.cli.shared import JsonOption, PluginOption, console, load_components
from contextlab.cli.tables import print_table
from contextlab.errors import InputError, nearest, unknown
from contextlab.kinds import KINDS
from contextlab.words import bytes_in_words

if TYPE_CHECKING:
    from contextlab.registry import Entry

LISTED = {**KINDS, "recipe": "recipes"}
LEGENDS = {
    "mixer": "state: how it grows with the T tokens read, and its size after 4096 of them at width 64. sequence: "
    "operations for T tokens at once, and how they are done. token: time of one more after T.",
    "policy": "options: with their defaults, as they are typed after the name and a colon. needs: what it must have "
    "besides the keys and values: queries, training, a second reading of the prompt, or what follows it, which no one "
    "has who serves a model.",
    "conversion": "options: with their defaults, as they are typed after the name and a colon (NAME:KEY=VALUE,...); "
    "one without a default must be given. needs: calibration, prompts or text that the model is read on; training; or "
    "other models.",
}


def list_(
    kind: Annotated[
        str | None, typer.Argument(help=f"One of: {', '.join(LISTED.values())}.", show_default=False)
    ] = None,
    family: Annotated[str | None, typer.Option(help="Only those of this family.")] = None,
    search: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only those whose name, description or papers have these words.")
    ] = None,
    as_json: JsonOption = False,
    plugin: PluginOption = None,
) -> None:
    """List what is known by name, family by family: mixers, tasks, policies, the report's figures and others.

    Examples:

      contextlab list mixers --family delta

      contextlab list tasks --search 'group word'
    """
    if kind is None:
        raise InputError(f"list: of what? (known: {', '.join(LISTED.values())})")
    kind = read_kind(kind)
    if kind == "recipe":
        if plugin:
            raise InputError("--plugin: recipes are files; contextlab show recipe FILE shows yours")
        rows = _recipes(family, search)
    else:
        load_components(plugin, (kind,))
        from contextlab import registry

        rows = [
            {"name": entry.name, "summary": entry.summary, "papers": list(entry.papers), **facts_of(entry)}
            for entry in _searched(_of_family(registry.entries(kind), kind, family), kind, search)
        ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    rows.sort(key=lambda row: (row.get("family", ""), row["name"]))
    print_table(
        "",
        [_cells(kind, row) for row in rows],
        prose=["what it is", "options"],
        optional=[] if kind == "recipe" else ["papers (arXiv)"],
        see=f"contextlab show {kind} NAME has them, as a wider terminal and --json.",
        heads="" if kind == "recipe" else "family",
    )
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
    if entry.kind == "conversion":
        needs: frozenset[str] = entry.factory.needs  # type: ignore[attr-defined]
        return {**facts, "needs": ", ".join(sorted(needs)) or "nothing", "options": options_of(entry)}
    return {**facts, "needs": _needs(entry), "options": options_of(entry)} if entry.kind == "policy" else facts


def options_of(entry: Entry) -> str:
    """Options with their defaults, as a user types them; those that no text can give (models) are left out."""
    from contextlab.policies.core.parse import written

    given = ("others", "base", "budget")  # models and budgets have options of the command line for them
    shown = (each for each in entry.parameters if each.name not in given)
    return ", ".join(each.name if each.required else f"{each.name}={written(each.default)}" for each in shown)


def _recipes(family: str | None, search: str | None) -> list[dict[str, Any]]:
    from contextlab.experiments import recipes

    if family is not None:
        raise InputError("--family: recipes have none")
    known = {recipe.name: recipe.description for recipe in recipes()}
    found = _with_words({name: f"{name} {told}" for name, told in known.items()}, "recipe", search)
    return [{"name": name, "summary": known[name]} for name in found]


def _searched(entries: list[Entry], kind: str, search: str | None) -> list[Entry]:
    """Those whose name, family, papers or docstring have all words of `search`."""
    told = {each.name: " ".join((each.name, each.family, *each.papers, each.doc)) for each in entries}
    found = _with_words(told, kind, search)
    return [entry for entry in entries if entry.name in found]


def _with_words(told: dict[str, str], kind: str, search: str | None) -> set[str]:
    """The names of which is told what has all words of `search`, whatever their case; _ and - are blanks too.

    Raises InputError where there are none.
    """

    def plain(text: str) -> str:
        return re.sub(r"[\s_-]+", " ", text.lower())

    words = plain(search or "").split()
    found = {name for name, text in told.items() if all(word in plain(text) for word in words)}
    if not found:
        near = nearest(str(search), told)
        hint = f"; did you mean {near!r}?" if near else f"; without it {len(told)} are listed"
        raise InputError(f"--search: no {kind} is described by {str(search)[:80]!r}{hint}")
    return found


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
    """What a policy needs besides keys and values, with default options."""
    if entry.required:
        return "?"
    policy = entry.factory()
    reads = {"": "", "prompt": "a second reading of the prompt", "everything": "the future: all that will be read"}
    told = [policy.needs, f"training of {policy.untrained}" if policy.untrained else "", reads[policy.reads_first]]
    return "; ".join(filter(None, told)) or "nothing"


def _first_sentence(text: str) -> str:
    """The first sentence; the dot of "et al." ends none."""
    return re.split(r"(?<!\bet al)\. ", text)[0].rstrip(".") + "."


def _cells(kind: str, row: dict[str, Any]) -> dict[str, str | Text]:
    """What a list shows of a component or recipe."""
    cells: dict[str, str | Text] = {"name": Text(row["name"], "cyan")}
    if kind == "recipe":
        return {**cells, "what it is": _first_sentence(row["summary"])}
    cells = {"family": row["family"], **cells, "what it is": row["summary"]}
    if kind in ("policy", "conversion"):
        cells["options"] = row["options"]
        cells["needs"] = row["needs"]
    if kind == "mixer":
        size = row["state_bytes"]
        cells["state"] = (
            "?" if size is None else "none" if size == 0 else f"{row['state_growth']}, {bytes_in_words(size)}"
        )
        cells["sequence"] = f"{row['sequence_cost']} ({row['parallel_form']})"
        cells["token"] = row["token_cost"]
    papers = row["papers"]
    return {**cells, "papers (arXiv)": "\n".join(", ".join(papers[i : i + 2]) for i in range(0, len(papers), 2))}
