"""Foretold bytes are those that are then held: of weights, of states, and of states under policies."""

from __future__ import annotations

import pytest
import torch

from contextlab.convert.variants import read_variants
from contextlab.errors import InputError
from contextlab.evaluation.advise.foretell import foretell, itself, shrunk, state_under
from contextlab.policies import parse_policy

from ..test_compress import model


def held(made, policy, length: int) -> int:
    """Bytes after really reading so many tokens."""
    tokens = torch.arange(length)[None] % 256
    with torch.no_grad():
        policy.prepare(made, tokens, length)
        with policy.attach(made):
            return made.read(tokens)[1].nbytes


@pytest.mark.parametrize(
    ("policy", "exact"),
    [
        ("keydiff:window=8", True),
        ("quantize:bits=4,window=8,group=8", True),
        ("keydiff:window=8|quantize:bits=4,window=8,group=8", True),
        ("snapkv:window=4", True),
        ("h2o:window=4", True),
        ("kvzip:window=4", False),
    ],
)
@pytest.mark.parametrize("options", [{}, {"kv_heads": 1, "short_conv": 4}])
def test_bytes_under_a_policy(policy: str, exact: bool, options: dict[str, int]) -> None:
    made = model(**options).eval()
    own = parse_policy(policy)
    own = own.with_budget("25%") if own.takes_budget else own
    told, known = state_under(made.spec, own, 160)
    assert known is exact
    really = held(made, own, 160)
    assert told == really if exact else really <= told < 1.3 * really


def test_a_policys_own_fault_is_not_taken_for_numbers_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = parse_policy("keydiff:window=8").with_budget("25%")
    for fault in (RuntimeError("sizes 3 and 4 do not agree"), TypeError("no such argument"), NotImplementedError()):

        def fail(*_: object, fault: Exception = fault) -> None:
            raise fault

        monkeypatch.setattr(type(policy), "prepare", fail)
        with pytest.raises(type(fault)):
            state_under(model().spec, policy, 64)
    told = [RuntimeError("Tensor.item() cannot be called on meta tensors"), TypeError("can't convert meta device type")]
    for fault in told:
        monkeypatch.setattr(type(policy), "prepare", lambda *_, fault=fault: (_ for _ in ()).throw(fault))
        assert not state_under(model().spec, policy, 64)[1]


def test_each_form_is_foretold_with_and_without_policies() -> None:
    made = model().eval()
    forms = [itself(made, ""), *(shrunk(v.text, v.spec, v.make, "") for v in read_variants(made, ["rtn:bits=8"]))]
    ways = foretell(forms, ["keydiff:window=8", "quantize:bits=4"], ["10%", "50%"], 128, 3)
    assert [(way.form.label, way.policy, way.budget) for way in ways[:4]] == [
        ("", "full", "full"),
        ("", "keydiff:window=8", "50%"),
        ("", "keydiff:window=8", "10%"),
        ("", "quantize:bits=4", "own"),
    ]
    for way in ways:
        assert way.weight_bytes == way.form.make().weight_nbytes
        if way.policy == "full":
            assert way.state_bytes == made.state_nbytes(128, 3)


def test_what_cannot_be_is_left_out_with_the_reason() -> None:
    linear = model("linear_attention")
    plain, policy = foretell([itself(linear, "")], ["h2o"], ["10%"], 64, 1)
    assert plain.left_out == ""
    assert "needs a model with a KV state" in policy.left_out
    for budget, message in (
        ("512tok", "expected a part of the full cache"),
        ("8MB", "expected a part"),
        ("x", "budget"),
    ):
        with pytest.raises(InputError, match=message):
            foretell([itself(linear, "")], ["h2o"], [budget], 64, 1)
