"""What a page holds, packed: read back as it was, by Python and by the page's own script; and few bytes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from contextlab import registry
from contextlab.report import build_report, packing
from contextlab.report.packing import pack, unpack, unpacked
from tests.report.conftest import make_records, make_results

MOST = 1_900_000
"""Bytes of any report."""
NODE = shutil.which("node")


def texts():
    """Noise, long and short repeats near and far, one byte again and again, several bytes a character, nothing."""
    source = random.Random(0)
    noise = "".join(chr(source.randrange(32, 2**10)) for _ in range(6_000))
    far = "".join(noise[source.randrange(5_000) :][: source.randrange(1, 400)] for _ in range(400))
    script = get_plotlyjs()
    return ["", "a", "<\u2192" * 50, "a" * 3_000, noise, noise + far + noise[::-1] + far[:40_000], script[-300_000:]]


@pytest.fixture(params=["lzma", "deflate"])
def form(request, monkeypatch):
    if request.param == "deflate":  # as a Python has it that was built without LZMA
        monkeypatch.setattr(packing, "lzma", None)
    return request.param


def test_what_is_packed_is_what_is_unpacked(form):
    for text in texts():
        packed = pack(text)
        assert (packed.form, packed.bytes) == (form, len(text.encode()))
        assert not set(packed.text) & set("<'\" \\\n")
        assert unpack(packed) == text


@pytest.mark.skipif(NODE is None, reason="no node on this machine")
def test_the_script_in_the_page_unpacks_it(form):
    code = (Path(packing.__file__).parent / "templates" / "unpack.js").read_text()
    code += """
      const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
      Promise.all(given.map((x) => unpackText(x.text, x))).then((all) => console.log(JSON.stringify(all)));
    """
    given = json.dumps([pack(text)._asdict() for text in texts()])
    done = subprocess.run([NODE, "-e", code], input=given, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout or "null") == texts(), done.stderr


def many_models(count=60, trials=12, seeds=3):
    """Results and records of one task as `mixers-on-recall` leaves them, every number with all its digits."""
    names = tuple(f"{entry.name}" for entry in registry.entries("mixer"))[:count]
    assert len(names) == count
    rng, rows = np.random.default_rng(0), make_results(seeds, models=names).query("task == 'recall'").copy()
    noise = 0.05 * rng.random(len(rows))
    for column in ("value", "ci_low", "ci_high"):
        rows[column] = (rows[column] - noise).where(rows["kind"] == "model", rows[column])
    records = []
    for record in make_records(names)[count:]:
        path, curve = "train.matrix_learning_rate", []
        for trial in range(trials):
            value, half = rng.random(), rng.random() / 50
            numbers = {"value": value, "ci_low": value - half, "ci_high": value + half}
            curve.append({"trial": trial, "setting": {path: 1e-4 * 1.7**trial}, "statuses": ["finished"] * seeds,
                          "stopped": [""] * seeds, "missing": 0, **numbers})  # fmt: skip
        sweep = {"trials": trials, "metric": "accuracy", "higher_is_better": True, "windows": {path: [1e-3, 1e-2]},
                 "curve": curve, "tied": {}}  # fmt: skip
        loss = [4 * rng.random() for _ in record["history"]["step"]]
        history = {**record["history"], "loss": loss}
        records += [
            {**record, "seed": seed, "history": history, "trial": 1, "setting": curve[1]["setting"], "sweep": sweep}
            for seed in range(seeds)
        ]
    return rows, records


def test_a_report_of_sixty_models_with_twelve_trials_each_is_below_its_most(tmp_path, run_record):
    rows, records = many_models()
    path = build_report(rows, records, [run_record], [{"name": "many"}], tmp_path / "many.html")
    assert path.stat().st_size < MOST
    data = json.loads(unpacked(path.read_text())["page"])
    told = json.dumps(data["figures"])
    assert all(f'"{name}"' in told for name in rows.loc[rows["kind"] == "model", "model"].unique())
    assert len(data["rows"]) > 60 * 5
    (swept,) = [each for each in data["figures"] if "matrix_learning_rate" in json.dumps(each["layout"])]
    assert sum(len(trace["x"]) == 12 for trace in swept["data"]) == 60  # every trial of every model
