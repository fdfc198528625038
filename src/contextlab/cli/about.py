"""`contextlab doctor` and `contextlab schema`: this machine, and the forms of specs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from contextlab import registry
from contextlab.cli.shared import JsonOption
from contextlab.cli.tables import print_table
from contextlab.errors import InputError, unknown
from contextlab.words import flat


def doctor(as_json: JsonOption = False) -> None:
    """Say which versions, devices and backends are in use, and why each op gets the backend that it gets."""
    from contextlab.evaluation.machine import machine_record
    from contextlab.ops.backend import backends

    record = machine_record()
    record.pop("backends", None)
    found = [vars(each) if not hasattr(each, "_asdict") else each._asdict() for each in backends()]
    alone = _trains_alone()
    if as_json:
        print(json.dumps({**record, "backends": found, "trains_alone": alone}, indent=2))
        return
    print_table("", [{"key": key, "value": value} for key, value in flat(record)], prose=["value"], header=False)
    print_table("ops", [{key: str(value) for key, value in each.items()} for each in found], prose=["why"])
    rows = [{"part": name, "why": why} for name, why in alone.items()]
    print_table("trained alone, not several as one program", rows, prose=["why"])


def _trains_alone() -> dict[str, str]:
    """Registered mixers and MLPs several of which cannot be trained as one program (`train_together`), and why."""
    return {
        f"{kind} {entry.name}": why
        for kind in ("mixer", "mlp")
        for entry in registry.entries(kind)
        if (why := getattr(entry.factory, "trains_alone", ""))
    }


def schema(
    what: Annotated[str, typer.Argument(help="experiment, model, task, train or evaluate.")] = "experiment",
) -> None:
    """Print the JSON Schema of a spec, for editors that check YAML while you type."""
    from contextlab.evaluation import EvaluateSpec
    from contextlab.experiments import ExperimentSpec
    from contextlab.models import ModelSpec
    from contextlab.tasks import TaskSpec
    from contextlab.training import TrainSpec

    specs: dict[str, Any] = {
        "experiment": ExperimentSpec,
        "model": ModelSpec,
        "task": TaskSpec,
        "train": TrainSpec,
        "evaluate": EvaluateSpec,
    }
    if what not in specs:
        raise InputError(unknown("spec", what, specs))
    print(json.dumps(specs[what].model_json_schema(), indent=2))
