"""Policies as they are written on the command line."""

from __future__ import annotations

from typing import Any

import pytest

from contextlab.errors import InputError
from contextlab.policies import EvictionPolicy, PerLayer, parse_options, parse_policy, takes_budget
from contextlab.policies.core.parse import write_options


def test_names_options_and_parts_are_read() -> None:
    assert parse_options("snapkv", "policy") == ("snapkv", {})
    assert parse_options("rtn:layers=*.mlp.*,bits=8", "method") == ("rtn", {"layers": "*.mlp.*", "bits": 8})
    assert parse_options(" needle : depth=0.5, part=train,tags=[1, 2]", "task") == (
        "needle",
        {"depth": 0.5, "part": "train", "tags": [1, 2]},
    )
    policy = parse_policy("snapkv:window=8,kernel=3", "10%")
    assert isinstance(policy, EvictionPolicy)
    assert (policy.window, policy.observe, str(policy.budget)) == (8, 8, "10%")
    both = parse_policy("h2o:window=8|quantize:bits=4", "64MB")
    assert isinstance(both, EvictionPolicy)
    assert str(both.budget) == "64MB"
    assert not both.lossless
    assert takes_budget("h2o|quantize")
    assert takes_budget("h2o")
    assert not takes_budget("quantize:bits=8")


def test_layers_get_policies_of_their_own() -> None:
    policy = parse_policy("0-1=none; 3 = h2o:window=8|quantize:bits=4; tova", "10%")
    assert isinstance(policy, PerLayer)
    assert {index: type(each).__name__ for index, each in policy.policies.items()} == {
        0: "NoneType",
        1: "NoneType",
        3: "H2O",
    }
    assert not policy.policies[3].lossless
    assert type(policy.default).__name__ == "TOVA"
    assert str(policy.default.budget) == "10%"
    alone = parse_policy("2=tova")
    assert isinstance(alone, PerLayer)
    assert alone.default is None
    assert takes_budget("0=none;h2o")
    assert not takes_budget("0=none;quantize")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0=h2o;0-2=tova", "layer 0 is given twice"),
        ("h2o;tova", "two parts name no layers"),
        ("3-1=h2o", "expected layers below"),
        ("0=none", "no layer has a policy"),
        ("0=h3o;tova", "unknown policy 'h3o'"),
        ("0=;tova", "expected NAME or NAME:option=value"),
        ("snapk", "unknown policy 'snapk'; did you mean 'snapkv'?"),
        ("", "expected NAME or NAME:option=value"),
        ("h2o:", "expected NAME or NAME:option=value"),
        ("h2o|", "expected NAME or NAME:option=value"),
        ("h2o:window", "expected option=value, got 'window'"),
        ("h2o:window=[", "the value of window cannot be read"),
        ("h2o:windw=3", "did you mean 'window'"),
        ("h2o:window=0", "window: expected a whole number of at least 1, got 0"),
        ("h2o:budget=10%", "budget is no option here; give it as --budget 10%"),
        ("quantize|h2o", "put an eviction policy on the left"),
    ],
)
def test_what_is_no_policy_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_policy(text, "10%")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weights": [0.5, 1.0]}, "weights=[0.5,1.0]"),
        ({"group": None, "zero": True, "layers": "*.mlp.*"}, "group=null,zero=true,layers=*.mlp.*"),
        ({"pattern": "2:4", "packed": False}, "pattern=2:4,packed=false"),
        ({"layers": "0,2", "mixers": ["gla", "attention"]}, "layers=0,2,mixers=[gla,attention]"),
        ({"mixer_options": {"heads": 2, "gate": None}}, "mixer_options={heads: 2, gate: null}"),
        ({"name": "yes", "other": "it's", "empty": ""}, "name='yes',other=it's,empty=''"),
    ],
)
def test_options_are_written_as_they_are_read(options: dict[str, Any], text: str) -> None:
    assert write_options(options) == text
    assert parse_options(f"x:{text}", "method") == ("x", options)
