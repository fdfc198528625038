"""`contextlab claims`: papers' claims, tested here."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from contextlab.cli.bars import Bars
from contextlab.cli.run import CheckOption, DeviceOption, JobsOption, print_check
from contextlab.cli.shared import JsonOption, console, going_on
from contextlab.cli.tables import print_table
from contextlab.errors import InputError, unknown

FolderOption = Annotated[Path, typer.Option("--folder", help="Where claims run.", metavar="FOLDER")]
BudgetOption = Annotated[str, typer.Option("--budget", help="quick, for a laptop, or gpu.", metavar="quick|gpu")]
ROOM = Path("runs/claims")


def list_claims(folder: FolderOption = ROOM, as_json: JsonOption = False) -> None:
    """The claims that can be tested, with what was decided of each: in the folder, or as published with contextlab.

    Example:

      contextlab claims list
    """
    from contextlab.claims import claim_files, load_claim

    rows = [_row(load_claim(name), folder) for name in claim_files()]
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    print_table(
        "", [{key: each[key] for key in ("claim", "paper", "verdict", "sentence")} for each in rows], prose=["sentence"]
    )
    console.print("[dim]contextlab claims run NAME tests one; contextlab papers show ID tells of its paper.[/dim]")


def run(
    name: Annotated[
        str | None, typer.Argument(help="A claim's name, or a YAML file of yours.", show_default=False)
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Test all claims, one after another.")] = False,
    budget: BudgetOption = "quick",
    folder: FolderOption = ROOM,
    device: DeviceOption = "auto",
    jobs: JobsOption = None,
    check: CheckOption = False,
    as_json: JsonOption = False,
) -> None:
    """Test a claim: run its experiment, and hold what was found to what the paper says.

    What was decided already is told at once, and what was interrupted goes on where it was.

    Examples:

      contextlab claims run few-attention-layers-restore-recall

      contextlab claims run --all
    """
    from contextlab.claims import BUDGETS, claim_files, load_claim

    if budget not in BUDGETS:
        raise InputError(f"--budget: {unknown('budget', budget, BUDGETS)}")
    if (name is None) == (not all_):
        raise InputError(
            "claims run: expected a claim's name or --all, one of them; contextlab claims list has the names"
        )
    chosen = [load_claim(each) for each in (claim_files() if all_ else [str(name)])]
    if all_ and budget == "gpu":
        chosen = [claim for claim in chosen if claim.gpu]
    for claim in chosen:  # all are tried before the first one runs
        claim.experiment(budget)
        claim.measured(budget)
    if check:
        for claim in chosen:
            _print_check(claim, budget, device, jobs)
        return
    records = []
    for claim in chosen:
        record = _tested(claim, budget, folder, quiet=as_json or not sys.stdout.isatty(), device=device, jobs=jobs)
        records.append(record)
        if not as_json:
            _tell(claim, record)
    if as_json:
        print(json.dumps(records if all_ else records[0], indent=2, ensure_ascii=False))


def report(
    out: Annotated[Path, typer.Option(help="File to write.", metavar="FILE")] = Path("claims.html"),
    folder: FolderOption = ROOM,
) -> None:
    """Draw one page of all claims: what each paper says, what was found here, and whether it holds.

    Example:

      contextlab claims report --out claims.html
    """
    from contextlab.claims import claims_page

    console.print(f"Written: {escape(str(claims_page(out, folder=folder)))}")


def _print_check(claim: Any, budget: Any, device: str, jobs: int | None) -> None:
    """What a claim would train, and what it measures beside."""
    spec = claim.experiment(budget)
    if spec is not None:
        print_check(spec, device, jobs, None)
    for name, each in claim.measures.items():
        console.print(f"{escape(claim.name)}: measures {escape(name)} ({escape(each.measure)})", highlight=False)
    if spec is None:
        console.print("[dim]nothing is trained[/dim]")


def _tested(claim: Any, budget: Any, folder: Path, quiet: bool, **options: Any) -> dict[str, Any]:
    """The record of a claim's verdict; bars are shown while it runs."""
    from contextlab.claims import run_claim
    from contextlab.experiments.jobs import all_jobs

    spec = claim.experiment(budget)
    bars = Bars(all_jobs(spec) if spec is not None else [], quiet=quiet)
    with going_on(lambda: "the same command goes on where it was"), bars:
        return run_claim(claim, budget=budget, folder=folder, progress=bars, **options)


def _row(claim: Any, folder: Path) -> dict[str, str]:
    from contextlab.claims import decided
    from contextlab.claims.page import published

    known = decided(claim, folder=folder) or published(claim)
    return {
        "claim": claim.name,
        "paper": claim.paper,
        "verdict": known["verdict"] if known else "-",
        "sentence": claim.sentence,
    }


def _tell(claim: Any, record: dict[str, Any]) -> None:
    """What was decided of a claim, and by which quantities."""
    from contextlab.claims.predicate import LEAST_SEEDS
    from contextlab.papers import in_words

    console.print(f"[bold]{claim.name}[/bold] ({claim.paper}): {escape(claim.sentence)}", highlight=False)
    rows = [
        {
            "quantity": each["said"],
            "found": told["found"],
            "95% interval": told["interval"],
            "asked": told["asked"],
            "held": {True: "yes", False: "no", None: "unclear"}[each["holds"]],
        }
        for each, told in ((each, in_words(each)) for each in record["outcomes"])
    ]
    print_table("", rows, prose=["quantity"])
    console.print(f"Verdict: [bold]{record['verdict']}[/bold]", highlight=False)
    if record["seeds"] is not None and record["seeds"] < LEAST_SEEDS:
        console.print(f"[dim]{record['seeds']} repeats; fewer than {LEAST_SEEDS} decide nothing[/dim]")
    console.print()


CLAIMS = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Papers' claims, tested here.")
for _command, _name in ((list_claims, "list"), (run, "run"), (report, "report")):
    CLAIMS.command(_name, help=escape(inspect.getdoc(_command) or ""))(_command)
