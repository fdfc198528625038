"""Run a claim: its experiment in a folder of its own, its predicate, and the record of what was decided.

FOLDER/NAME/run             the run of its recipe, as `contextlab run` leaves it
FOLDER/NAME/verdict.json    what was decided, of which recipe and predicate
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contextlab.claims.claim import Budget, Claim
from contextlab.claims.predicate import Outcome, verdict_of
from contextlab.errors import InputError
from contextlab.experiments import Run, load_recipe, run
from contextlab.experiments.folder import RunFolder, read_run_record
from contextlab.files import read_record, write_record
from contextlab.report.findings import Term, findings

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
    asked = [quantity.model_dump(mode="json", exclude={"said"}) for quantity in claim.predicate]
    text = json.dumps([recipe, asked], sort_keys=True, default=str)
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
    spec = claim.experiment(budget)
    place = Path(folder) / claim.name
    at = RunFolder(place / "run")
    begun, whole = at.record.exists(), at.status() == "finished"
    if begun and at.spec.exists() and load_recipe(at.spec) != spec:
        raise InputError(
            f"{at}: is a run of another form of claim {claim.name}; remove it, or choose another folder with --folder"
        )
    clock, processor = time.perf_counter(), _processor()
    found = run(spec, out=at.path, resume=begun, progress=progress, **options)
    record = judge(claim, found, budget)
    record["cost"] = (_cost_before(place / VERDICT) if whole else None) or {
        "seconds": round(time.perf_counter() - clock, 1),
        "processor_seconds": round(_processor() - processor, 1),
        "whole": not begun,
    }
    record["made_with"] = read_run_record(at.record, {}).get("versions", {})
    write_record(place / VERDICT, record)
    return read_record(place / VERDICT, OF_VERDICT)


def run_control(claim: Claim, out: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """What the predicate says of the negative control, which must make it fail.

    changes: further ones of the recipe, such as smaller sizes.
    """
    return judge(claim, run(claim.experiment(changes=(*claim.control, *changes)), out=out, progress=False))


def judge(claim: Claim, found: Run, budget: Budget = "quick") -> dict[str, Any]:
    """What a claim's predicate says of a run of its recipe, as plain data."""
    by_task = {each.task: each for each in findings(found.results, found.by_prompt if len(found.by_prompt) else None)}
    outcomes = []
    for quantity in claim.predicate:
        of_task = by_task[quantity.task]
        metric = quantity.metric or of_task.metric
        terms = [Term(weight, who, quantity.split, metric) for who, weight in quantity.weights.items()]
        outcomes.append(Outcome(quantity, of_task.combine(terms)))
    seeds = min((mean.seeds for each in by_task.values() for mean in each.means if mean.kind == "model"), default=0)
    return {
        "name": claim.name,
        "paper": claim.paper,
        "verdict": verdict_of(outcomes, seeds),
        "outcomes": [outcome.told() for outcome in outcomes],
        "seeds": seeds,
        "budget": budget,
        "spec": spec_hash(claim, budget),
    }


def _cost_before(path: Path) -> dict[str, Any] | None:
    """What the run took that an older verdict was of, and this one is of, too; None where there is no such verdict."""
    return read_record(path, OF_VERDICT).get("cost") if path.exists() else None


def _processor() -> float:
    """Seconds of processor time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
