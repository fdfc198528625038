"""`advise`: what fits is measured once, what does not is left out with the reason, and other questions read it."""

from __future__ import annotations

import pytest

from contextlab.convert.variants import read_variants
from contextlab.errors import InputError
from contextlab.evaluation.advise import advise
from contextlab.evaluation.advise.foretell import itself, other, shrunk
from contextlab.evaluation.compress import compress
from contextlab.models.digest import fingerprint
from contextlab.report.advice import measured, name_of

from ..test_compress import model, value

TASK = "mqar:pairs=16,vocabulary=32"
OPTIONS = {"tasks": [TASK], "prompts": 2, "together": 2, "at": 56, "policies": ["streaming_llm:sinks=2"]}


def ask(memory: float, folder, seed: int = 0, **more):
    own, linear = model(seed=seed), model("linear_attention")
    forms = [shrunk(v.text, v.spec, v.make, "") for v in read_variants(own, ["rtn:bits=8"])]
    forms.append(other("linear", linear, fingerprint(linear)))
    return advise(own, memory, 1024, 4, forms=forms, folder=folder, budgets=["50%", "25%"], **{**OPTIONS, **more})


def test_what_fits_is_measured_and_the_next_question_reads_it(tmp_path) -> None:
    found = ask(4.5e5, tmp_path / "kept")
    reasons = {name_of(way): way.left_out for way in found.ways}
    assert reasons["the model itself"].endswith("too large")
    assert reasons["streaming_llm:sinks=2 at 50%"].endswith("too large")
    fits = ["streaming_llm:sinks=2 at 25%", "streaming_llm:sinks=2 at 25% on rtn:bits=8", "linear"]
    assert [name_of(way) for way in found.fitting] == fits
    assert all(way.total <= 4.5e5 for way in found.fitting)
    assert found.measured == 3
    direct = compress(
        model(), ["streaming_llm:sinks=2"], ["25%"], [TASK], [56], prompts=2, batch=2,
        compare={"linear": model("linear_attention")},
    )  # fmt: skip
    for name in ("linear", "streaming_llm:sinks=2"):
        own = found.results[found.results["weights"].isna()]
        assert value(own, name, "cross_entropy") == pytest.approx(value(direct, name, "cross_entropy"), rel=1e-6)
    assert ask(4.5e5, tmp_path / "kept").measured == 0
    more = ask(2e6, tmp_path / "kept")  # the full cache fits: policies are left out, quality of the linear one is read
    assert {name_of(way) for way in more.fitting} == {"the model itself", "rtn:bits=8", "linear"}
    assert more.measured == 1
    assert ask(2e6, None, policies=[]).measured == 3  # of a folder that held nothing, the model itself, too
    assert len(more.results) > len(found.results)
    assert {way.left_out for way in more.ways if way.policy != "full"} == {"the full cache fits"}


def test_a_folder_of_other_measurements_is_refused(tmp_path) -> None:
    ask(3e5, tmp_path / "kept", policies=[])
    for change, message in (
        ({"seed": 1}, "holds measurements of another model; give another --out"),
        ({"prompts": 3}, "holds measurements of other prompts"),
    ):
        with pytest.raises(InputError, match=message):
            ask(3e5, tmp_path / "kept", policies=[], **change)
    with pytest.raises(InputError, match="two candidates are called"):
        advise(model(), 1e6, 64, forms=[itself(model(), "")], **OPTIONS)


def test_a_policy_whose_window_holds_the_prompts_is_not_judged_by_them() -> None:
    found = ask(6e5, None, policies=["quantize:bits=4,window=64"])
    reasons = {name_of(way): way.left_out for way in found.ways}
    assert reasons["quantize:bits=4,window=64"].startswith("on prompts of 56 tokens it keeps all")
    assert [name_of(way) for way in found.fitting] == ["linear"]


def test_nothing_is_read_where_nothing_fits() -> None:
    found = ask(1e3, None)
    assert found.fitting == []
    assert found.measured == 0
    assert len(found.results) == 0
    assert measured(found) == {}
