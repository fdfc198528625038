"""`compress` on forms of the weights: what is measured of each is what the model itself would give, and its bytes."""

from __future__ import annotations

import pandas as pd
import pytest

from contextlab.convert.variants import read_variants
from contextlab.errors import InputError
from contextlab.evaluation.compress import compress
from contextlab.models import weight_nbytes
from contextlab.report import compress_table

from .test_compress import model, value


@pytest.fixture(scope="module")
def found() -> pd.DataFrame:
    own = model()
    forms = {"same": own, **{each.text: each.make() for each in read_variants(own, ["rtn:bits=8"])}}
    return compress(
        own, ["streaming_llm:sinks=2"], ["50%"], ["mqar:pairs=8,vocabulary=64"], [64], prompts=2, batch=2,
        weights=forms, sequences=3,
    )  # fmt: skip


def test_each_form_of_the_weights_is_measured_alone_and_with_every_policy(found: pd.DataFrame) -> None:
    own, forms = found[found["kind"] == "policy"], found[found["kind"] == "weights"]
    assert set(own["weights"].dropna()) == set()
    assert set(forms["weights"]) == {"same", "rtn:bits=8"}
    for policy, budget in (("full", "full"), ("streaming_llm:sinks=2", "50%")):
        for metric in ("cross_entropy", "kl", "accuracy", "state_bytes"):
            same = value(forms, policy, metric, budget, weights="same")
            assert same == pytest.approx(value(own, policy, metric, budget), rel=1e-6, abs=1e-9), metric
    assert value(forms, "full", "kl", weights="rtn:bits=8") > 1e-9


def test_bytes_of_weights_are_foretold_and_stand_beside_those_of_states(found: pd.DataFrame) -> None:
    spec = read_variants(model(), ["rtn:bits=8"])[0].spec
    form = found[found["weights"] == "rtn:bits=8"]
    for policy in ("full", "streaming_llm:sinks=2"):
        weights, state, total = (value(form, policy, f"{each}_bytes") for each in ("weight", "state", "total"))
        assert weights == weight_nbytes(spec)
        assert total == weights + 3 * state
    assert set(found.loc[found["metric"] == "total_bytes", "sequences"]) == {3}
    assert value(found[found["kind"] == "policy"], "full", "weight_bytes") == model().weight_nbytes > weights
    (rows,) = compress_table(found).values()
    assert [row["weights"] for row in rows] == ["own", "own", "same", "same", "rtn:bits=8", "rtn:bits=8"]
    plain = compress_table(found[found["kind"] == "policy"])
    assert not {"weights", "stored", "total"} & next(iter(plain.values()))[0].keys()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["wanda"], "wanda: needs data to calibrate on"),
        (["rtn:bits=3"], "bits"),
        (["rtn", "rtn"], "rtn is given twice"),
        (["rtn|gptq"], "gptq: needs data"),
        (["average"], "makes no model smaller"),
        (["rtm"], "did you mean 'rtn'"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_variants(model(), texts)


def test_methods_in_a_row_are_one_form() -> None:
    own = model()
    both, second = read_variants(own, ["channels:share=0.5,refit=false|rtn:bits=8", "rtn:bits=8"], DATA)
    assert weight_nbytes(both.spec) == both.make().weight_nbytes < weight_nbytes(second.spec)


DATA = "associative_recall:vocabulary=256,pairs=4,length=24"
