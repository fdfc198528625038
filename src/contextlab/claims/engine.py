"""Run a claim: its experiment in a folder of its own, its predicate, and the record of what was decided.

FOLDER/NAME/run             the run of its recipe, as `contextlab run` leaves it, where it has one
FOLDER/NAME/measures        tables of its measures, each named by what it was taken with
FOLDER/NAME/verdict.json    what was decided, of which recipe and predicate
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from contextlab.claims.cells import Table
from contextlab.claims.claim import Budget, Claim
from contextlab.claims.measures import Measure
from contextlab.claims.predicate import Outcome, Quantity, verdict_of
from contextlab.claims.sums import value_of
from contextlab.errors import InputError
from contextlab.evaluation.machine import machine_record
from contextlab.evaluation.results import read_results, write_results
from contextlab.experiments import Run, load_recipe, run
from contextlab.experiments.folder import RunFolder, read_run_record
from contextlab.files import make_folder, read_record, write_record
from contextlab.report.findings import findings
from contextlab.training.distributed import resolve

ROOM = Path("runs/claims")
"""Where claims run unless another folder is given."""
VERDICT = "verdict.json"
OF_VERDICT: dict[str, type] = {"name": str, "verdict": str, "outcomes": list, "spec": str, "budget": str}
"""What a verdict's record must hold."""


def spec_hash(claim: Claim, budget: Budget = "quick") -> str:
    """What tells a claim's recipe and predicate, as they are written, from others: a change makes a verdict old.

    Words that decide nothing, such as the sentence, may change.
    """
    recipe = {key: value for key, value in claim.data(budget).items() if key not in ("name", "description")}
    asked: list[Any] = [recipe, [quantity.asked() for quantity in claim.predicate]]
    if claim.measures:
        asked.append([dict(claim._changed(budget, ())[1])])
    text = json.dumps(asked, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def decided(claim: Claim, budget: Budget = "quick", folder: str | Path = ROOM) -> dict[str, Any] | None:
    """The record of a claim's verdict in `folder`; None where there is none of this recipe and predicate."""
    path = Path(folder) / claim.name / VERDICT
    if not path.exists():
        return None
    record = read_record(path, OF_VERDICT, "delete it, and what was measured is judged again")
    return record if record["spec"] == spec_hash(claim, budget) else None


def run_claim(
    claim: Claim, *, budget: Budget = "quick", folder: str | Path = ROOM, progress: Any = None, **options: Any
) -> dict[str, Any]:
    """Test a claim and write what was decided; what was decided of this recipe and predicate before is given at once.

    A run that was interrupted goes on where it was; one that is finished is judged without training again.
    progress: as `experiments.run` takes it, as are the other options, such as jobs and device.

    Raises InputError where the folder holds a run of another recipe, and Interrupted as `run` does.
    """
    known = decided(claim, budget, folder)
    if known is not None:
        return known
    place = Path(folder) / claim.name
    clock, processor = time.perf_counter(), _processor()
    run, fresh = _run(claim, budget, place / "run", progress, options)
    tables, taken = _tables(claim.measured(budget), run, place / "measures", options.get("device", "auto"))
    record = judge(claim, run, tables, budget)
    took = {
        "seconds": round(time.perf_counter() - clock, 1),
        "processor_seconds": round(_processor() - processor, 1),
        "whole": fresh is not False and taken is not False,
    }
    record["cost"] = (None if fresh or taken else _cost_before(place / VERDICT)) or took
    versions = read_run_record(RunFolder(run.folder).record, {}).get("versions") if run is not None else None
    record["made_with"] = versions or machine_record()["versions"]
    write_record(place / VERDICT, record)
    return read_record(place / VERDICT, OF_VERDICT)


def _run(
    claim: Claim, budget: Budget, path: Path, progress: Any, options: dict[str, Any]
) -> tuple[Run | None, bool | None]:
    """The run of a claim's recipe, and whether it was begun here (None: there is no recipe, or it was whole)."""
    spec = claim.experiment(budget)
    if spec is None:
        return None, None
    at = RunFolder(path)
    begun, whole = at.record.exists(), at.status() == "finished"
    if begun and at.spec.exists() and load_recipe(at.spec) != spec:
        raise InputError(
            f"{at}: is a run of another form of claim {claim.name}; remove it, or choose another folder with --folder"
        )
    found = run(spec, out=at.path, resume=begun, progress=progress, **options)
    return found, None if whole else not begun


def _tables(
    measures: Mapping[str, Measure], found: Run | None, folder: Path, device: str
) -> tuple[dict[str, Table], bool | None]:
    """The tables of measures by name, and whether all were taken here (None: none was, False: some were).

    Those that no run is read for are kept in `folder`, and taken again only where they are asked with other options.
    """
    tables, taken = {}, []
    for name, made in measures.items():
        path = folder / f"{name}.{hashlib.sha256(repr(made).encode()).hexdigest()[:16]}.parquet"
        kept = not made.of_run and path.exists()
        rows = read_results(path) if kept else made.rows(found, resolve(device))
        if not made.of_run:
            taken.append(not kept)
            if not kept:
                make_folder(folder)
                write_results(rows, path)
        tables[name] = made.table(rows)
    return tables, None if not any(taken) else all(taken)


def run_control(claim: Claim, out: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """What the predicate says of the negative control, which must make it fail.

    changes: further ones of the recipe, such as smaller sizes.
    """
    changes = (*claim.control, *changes)
    spec = claim.experiment(changes=changes)
    found = run(spec, out=out, progress=False) if spec is not None else None
    tables = {
        name: made.table(made.rows(found, torch.device("cpu")))
        for name, made in claim.measured("quick", changes).items()
    }
    return judge(claim, found, tables)


def judge(
    claim: Claim, found: Run | None, tables: Mapping[str, Table] | None = None, budget: Budget = "quick"
) -> dict[str, Any]:
    """What a claim's predicate says of a run of its recipe and of its measures' tables, as plain data."""
    known = {**(_of_run(found) if found is not None else {}), **(tables or {})}
    outcomes = [
        Outcome(quantity, *value_of(quantity, known), repeats=_repeats(quantity, known)) for quantity in claim.predicate
    ]
    return {
        "name": claim.name,
        "paper": claim.paper,
        "verdict": verdict_of(outcomes),
        "outcomes": [outcome.told() for outcome in outcomes],
        "seeds": min((each.repeats for each in outcomes if each.repeats is not None), default=None),
        "budget": budget,
        "spec": spec_hash(claim, budget),
    }


def _repeats(quantity: Quantity, tables: Mapping[str, Table]) -> int | None:
    """The fewest trainings, turns or draws that a quantity rests on; None where all of it is counted."""
    found = [tables[str(each.task)].repeats for each in quantity.sums().values()]
    return min((each for each in found if each is not None), default=None)


def _of_run(found: Run) -> dict[str, Table]:
    """A run's results as tables, by task."""
    told = findings(found.results, found.by_prompt if len(found.by_prompt) else None)
    of_task = {str(task): rows for task, rows in found.results.groupby("task", sort=False)}
    return {each.task: Table(of_task[each.task], "trainings", "prompts", each) for each in told}


def _cost_before(path: Path) -> dict[str, Any] | None:
    """What the run took that an older verdict was of, and this one is of, too; None where there is no such verdict."""
    return read_record(path, OF_VERDICT).get("cost") if path.exists() else None


def _processor() -> float:
    """Seconds of processor time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
