"""`contextlab inspect`: the places of a model."""

from __future__ import annotations

import json

import pytest

from contextlab import build_model, build_task, save_model
from contextlab.inspect import sites
from contextlab.inspect.looking import read_looked
from contextlab.report.packing import unpacked


def test_every_place_is_listed_and_layers_that_are_alike_share_a_row(call, tmp_path):
    model = build_model("mambaformer", width=16, depth=4, heads=2, input_size=8, output_size=8, read_in="token")
    save_model(model, tmp_path / "saved")
    code, out, _ = call("inspect", "saved", "--sites", "--json")
    assert code == 0
    rows = json.loads(out)
    named = {
        name
        for row in rows
        for name in ([row["pattern"]] if not row["layers"] else [_named(row["pattern"], n) for n in row["layers"]])
    }
    assert named == set(sites(model))
    assert all(row["what"] and row["shape"] for row in rows)
    shapes = {(row["pattern"], tuple(row["layers"])): row["shape"] for row in rows}
    assert shapes["blocks.*.output", tuple(range(len(model.blocks)))] == "[B, T, 16]"
    assert shapes["embedded", ()] == "[B, T, 16]"
    assert shapes["logits", ()] == "[B, T, 8]"
    code, out, _ = call("inspect", "saved", "--sites", "--only", "blocks.1.mixer.*")
    assert code == 0
    assert "blocks.1.mixer.heads" in out
    assert "mlp" not in out


def _named(pattern, number):
    return pattern.replace("blocks.*", f"blocks.{number}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "--task: on whose prompts?"),
        (("transformr", "--sites"), "did you mean 'transformer'"),
        (("transformer", "--task", "associative_recall"), "transformer: is a preset, whose weights are not trained"),
        (("transformer", "--probe", "hed"), "unknown probe 'hed'; did you mean 'heads'"),
        (("transformer", "--sites", "--probe", "heads"), "--probe: --sites lists places and measures nothing"),
        (("transformer", "--only", "blocks.*"), "--only: is of --sites"),
        (("transformer", "--sites", "--only", "blks.*"), "no site matches 'blks.*'"),
        (("transformer", "--sites", "--only", "blocks.0.mixer.w"), "unknown site 'blocks.0.mixer.w'; did you mean"),
    ],
)
def test_what_is_not_there_is_told(call, arguments, said):
    code, out, err = call("inspect", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_maps_stand_in_the_page_where_they_are_asked_for(call, tmp_path):
    task = "associative_recall:pairs=3,length=16,vocabulary=16"
    model = build_model("transformer", width=16, depth=1, heads=2, input_size=16, output_size=16, read_in="token")
    save_model(model, tmp_path / "saved")
    for flags in ((), ("--html",)):
        code, _, err = call("inspect", "saved", "--task", task, "--probe", "heads:prompts=2", *flags)
        assert (code, err) == (0, "")
        held = unpacked((tmp_path / "inspected" / "saved" / "inspect.html").read_text())
        assert ("maps" in held) == bool(flags)
    (shown,) = json.loads(held["maps"])
    assert [part["name"] for part in shown["parts"]] == ["whole model", "layer 0"]
    assert "--html: --sites lists places" in call("inspect", "saved", "--sites", "--html")[2]


def test_a_saved_model_is_looked_into(call, tmp_path):
    model = build_model("transformer", width=16, depth=1, heads=2, input_size=24, output_size=24, read_in="token")
    save_model(model, tmp_path / "saved")
    task = "associative_recall:vocabulary=16,pairs=2,length=12"
    code, out, _ = call("inspect", "saved", "--task", task, "--probe", "heads:prompts=4", "--out", "seen")
    assert code == 2  # its own task has other tokens
    size = build_task("associative_recall", vocabulary=16, pairs=2, length=12).input_size
    save_model(
        build_model("transformer", width=16, depth=1, heads=2, input_size=size, output_size=size, read_in="token"),
        tmp_path / "fitting",
    )
    code, out, _ = call("inspect", "fitting", "--task", task, "--probe", "heads:prompts=4", "--out", "seen")
    assert code == 0
    assert "head" in out
    assert (tmp_path / "seen" / "inspect.html").exists()
    found = read_looked([tmp_path / "seen" / "inspect.parquet"])
    code, out, _ = call("inspect", "fitting", "--task", task, "--probe", "heads:prompts=4", "--out", "seen", "--json")
    assert code == 0
    assert len(json.loads(out)) == len(found) > 0
