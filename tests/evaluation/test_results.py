"""The results table: written whole, read back the same, put together over seeds."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from scipy import stats

from contextlab.errors import InputError
from contextlab.evaluation import COLUMNS, read_results, summarise, write_results
from contextlab.evaluation.results import table


def rows(values, **changes):
    base = {
        "run": "r",
        "model": "m",
        "kind": "model",
        "task": "t",
        "split": "train",
        "metric": "e",
        "length": 4,
        "n": 9,
    }
    return table(
        {**base, "seed": i, "value": v, "ci_low": v - 0.5, "ci_high": v + 0.5, **changes} for i, v in enumerate(values)
    )


def test_round_trip(tmp_path):
    results = pd.concat([rows([1.0, 2.0]), rows([3.0], shot=2)], ignore_index=True)
    write_results(results, tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(read_results(tmp_path / "a.parquet"), results)
    assert len(read_results([tmp_path / "a.parquet"] * 2)) == 6
    assert tuple(pd.read_parquet(tmp_path / "a.parquet").columns) == COLUMNS


def test_one_seed_keeps_its_interval():
    one = summarise(rows([1.0])).iloc[0]
    assert (one["value"], one["ci_low"], one["ci_high"], one["seeds"]) == (1.0, 0.5, 1.5, 1)


@pytest.mark.parametrize("count", [2, 3, 10, 40])
def test_seeds_are_put_together_by_students_t(count):
    values = [float(i % 7) for i in range(count)]
    got = summarise(rows(values)).iloc[0]
    series = pd.Series(values)
    t = stats.t.ppf(0.975, count - 1)
    half = math.hypot(t * series.std() / math.sqrt(count), 0.5)
    assert got["value"] == pytest.approx(series.mean())
    assert got["ci_high"] - got["value"] == pytest.approx(half, rel=0.04)


def test_bad_files_are_one_line(tmp_path):
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(InputError, match="damaged or not Parquet"):
        read_results(tmp_path / "bad.parquet")
    with pytest.raises(InputError, match="no such file"):
        read_results(tmp_path / "none.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="is not a results table: it lacks the columns"):
        read_results(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="results lack the columns"):
        write_results(pd.DataFrame({"run": []}), tmp_path / "x.parquet")
