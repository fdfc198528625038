"""Costs: what is counted is exact; what is measured comes from a process of its own."""

from __future__ import annotations

import subprocess

import pytest

from contextlab.errors import InputError, ResourceError
from contextlab.evaluation import cost, static_cost
from contextlab.evaluation.machine import machine_record
from contextlab.models import ModelSpec, build_model

SMALL = {"width": 16, "depth": 1, "heads": 2, "read_in": "token", "input_size": 8, "output_size": 8}


def test_static_costs_are_the_models_own_counts():
    model = build_model("transformer", **SMALL)
    values = static_cost(model, 40).set_index("metric")["value"]
    assert values["parameters"] == sum(p.numel() for p in model.parameters())
    assert values["state_bytes"] == model.state_nbytes(40)
    assert values["flops"] == model.flops(40)


def test_measured_costs():
    results = cost(build_model("mambaformer", **{**SMALL, "depth": 2}), [16, 4096], repeats=2)
    assert set(results["length"]) == {16, 4096}
    wide = results.pivot_table(index="length", columns="metric", values="value")
    assert (wide > 0).loc[4096].all()
    assert wide.loc[4096, "prefill_seconds"] > wide.loc[16, "prefill_seconds"]
    assert wide.loc[4096, "state_bytes"] > wide.loc[16, "state_bytes"]
    # Reading 4096 tokens of width 16 holds at least one activation of them.
    assert wide.loc[4096, "peak_bytes"] > 4096 * 16 * 4
    measured = results[results["metric"] == "prefill_seconds"]
    assert (measured["ci_low"] <= measured["value"]).all()
    assert (measured["ci_high"] >= measured["value"]).all()
    assert (measured["n"] == 2).all()


def test_what_the_process_refuses_is_one_line():
    with pytest.raises(InputError, match="does not fit max_length 8"):
        cost({**SMALL, "position": "learned", "max_length": 8}, [16], repeats=1)


@pytest.mark.parametrize(
    ("code", "errors", "raised", "said"),
    [
        (2, "a warning\ndepth: too large\n", InputError, "^depth: too large$"),
        (1, "Traceback ...\nValueError: odd\n", ResourceError, "^measuring at 8 tokens failed: ValueError: odd$"),
        (-9, "", ResourceError, "^measuring at 8 tokens failed: it was killed, most likely for want of memory$"),
    ],
)
def test_how_the_process_ended_is_told(monkeypatch, code, errors, raised, said):
    ended = subprocess.CompletedProcess([], code, "", errors)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: ended)
    with pytest.raises(raised, match=said):
        cost(ModelSpec(**SMALL), [8])


def test_a_length_beyond_the_memory_is_refused_before_a_process_starts():
    began: list[int] = []
    with pytest.raises(ResourceError, match="memory"):
        cost({**SMALL, "width": 4096}, [16, 2**40], repeats=1, progress=began.append)
    assert began == []


def test_machine_record_names_versions_processor_and_backends():
    record = machine_record()
    assert {"contextlab", "python", "torch"} <= set(record["versions"])
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["processor"]
    assert all(each["why"] for each in record["backends"])
