"""`contextlab check`: hold a component to the laws of its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from contextlab.cli.shared import PARTS, PluginOption, console, load_components
from contextlab.cli.tables import print_table
from contextlab.kinds import KINDS

if TYPE_CHECKING:
    from contextlab.testing import Held


def check(
    kind: Annotated[str, typer.Argument(help="mixer, mlp, model, task, learner, policy, conversion or linear.")],
    name: Annotated[str, typer.Argument(help="As `contextlab list` prints it.")],
    examples: Annotated[
        int, typer.Option(min=1, max=100_000, help="Cases to try for each law that has them; the same each time.")
    ] = 25,
    plugin: PluginOption = None,
) -> None:
    """Hold a component, yours too, to every law of its kind, in each option case that it is registered with.

    Prints each law, held or broken, with the smallest case found that breaks it. Exit code 1 when one is broken.

    Examples:

      contextlab check mixer gated_delta_net

      contextlab check task my_task --plugin my_task.py
    """
    kind = kind.removesuffix("s") if kind not in ("policies",) else "policy"
    load_components(plugin, PARTS if kind in PARTS or kind not in KINDS else (*PARTS, kind))
    from contextlab.testing import check as hold
    from contextlab.testing import components

    found: list[Held] = []
    cases = len(components(kind, name))
    with console.status("") as status:
        for each in hold(kind, name, examples=examples):
            found.append(each)
            status.update(f"{escape(each.component.label)}: {escape(each.law.name)}")
    _show(kind, name, cases, found)
    if any(each.broken for each in found):
        raise typer.Exit(1)


def _show(kind: str, name: str, cases: int, found: list[Held]) -> None:
    """A row a law: how many cases hold; below, each break with its case."""
    by_law: dict[str, list[Held]] = {}
    for each in found:
        by_law.setdefault(each.law.name, []).append(each)
    rows: list[dict[str, str | Text]] = []
    for law, results in by_law.items():
        broken = [each for each in results if each.broken is not None]
        word = Text(f"broken in {len(broken)} of {len(results)}", "bold red") if broken else Text("held", "green")
        rows.append({"law": law, "result": word, "what it says": results[0].law.statement})
    console.print(f"[bold]{kind} {escape(name)}[/], in {cases} case{'s' * (cases != 1)}")
    print_table("", rows, prose=["what it says"])
    breaks: dict[str, list[Held]] = {}  # one cause often breaks many laws: it is told once
    for each in found:
        if each.broken is not None:
            breaks.setdefault(each.broken.reason, []).append(each)
    for reason, alike in breaks.items():
        names, places = (
            list(dict.fromkeys(of)) for of in zip(*((e.law.name, e.component.label) for e in alike), strict=True)
        )
        console.print(f"\n[bold red]{escape('; '.join(names))}[/] with {escape('; '.join(places))}", highlight=False)
        console.print(f"  {escape(reason)}", highlight=False)
        if case := min((e.broken.case for e in alike if e.broken is not None and e.broken.case), key=len, default=""):
            console.print(f"  [dim]smallest case found: {escape(case)}[/]", highlight=False)
    if not _documented(found[0].component.factory):
        console.print(f"\n{escape(name)} has no docstring: its first line is what `contextlab list` says of it.")
    kept = sum(all(each.broken is None for each in results) for results in by_law.values())
    console.print(f"\n{kept} of {len(by_law)} laws held.")


def _documented(factory: Any) -> bool:
    """Whether it has a docstring of its own; that which a dataclass writes for itself is none."""
    if not isinstance(factory, type):
        return bool(factory.__doc__)
    doc = vars(factory).get("__doc__") or ""
    return bool(doc) and not doc.startswith(f"{factory.__name__}(")
