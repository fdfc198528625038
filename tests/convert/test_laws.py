"""Every registered conversion is held to the laws, on several mixers; and the laws bite."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from contextlab import registry
from contextlab.convert import Conversion, Converted, build_conversion
from contextlab.convert.base import Change, copied
from contextlab.errors import InputError
from contextlab.testing import LawBroken, laws, parametrize_with_laws
from contextlab.testing.conversions import cases


@parametrize_with_laws("conversion")
def test_conversions_keep_the_laws(law):
    law()


@dataclass(frozen=True)
class Broken(Conversion):
    """Does what no conversion may."""

    fault: str = ""

    def plan(self, spec):
        return spec.model_copy(update={"depth": spec.depth - 1}) if self.fault == "plan" else spec

    def apply(self, model, data, generator):
        made = model if self.fault == "old model" else copied(model)
        weight = made.blocks[0].mlp.up.weight
        with torch.no_grad():
            if self.fault == "same seed":
                weight.add_(torch.randn_like(weight))
            elif self.fault == "saved":
                made.blocks[0].mlp.up = torch.nn.Sequential(made.blocks[0].mlp.up)
            elif self.fault == "after another" and model.spec.linear:
                raise InputError("not after another")
            elif self.fault == "reads on":
                made.blocks[0].mlp.register_forward_hook(lambda mlp, given, y: y + y.flip(1))
            else:
                weight.mul_(0.5)
        where = "blocks.9" if self.fault == "lines" else "blocks.0.mlp.up"
        return Converted(made, [Change(where, "halved", 0.5, "weights", weight.nbytes, weight.nbytes)])


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setitem(registry._entries, "conversion", dict(registry._entries["conversion"]))

    def hold(name, fault, **more):
        monkeypatch.setitem(registry._entries["conversion"], "broken", None)
        entry = registry.Entry("conversion", "broken", type("Broken", (Broken,), more), (), ({"fault": fault},))
        registry._entries["conversion"]["broken"] = entry
        (law,) = (each for each in laws("conversion") if each.name == name)
        law(next(iter(cases(entry))))

    return hold


@pytest.mark.parametrize("name", ["plan", "old model", "lines", "same seed", "saved", "reads on", "after another"])
def test_a_law_bites(broken, name):
    broken(name, "")
    with pytest.raises(LawBroken, match=f"breaks the law {name!r}"):
        broken(name, name)


def test_what_changes_something_where_it_should_not_is_seen(broken):
    with pytest.raises(LawBroken, match="answers differ by"):
        broken("nothing to do", "", nothing={"fault": ""})


def test_a_name_and_options_are_checked():
    assert build_conversion("magnitude", share=0.25).share == 0.25
    for options, message in (
        ({"share": 1.0}, "share: input should be less than 1"),
        ({"shar": 0.5}, "did you mean 'share'?"),
        ({"pattern": "2:x"}, "pattern: expected n:m, n of each m weights that stay, such as 2:4, got '2:x'"),
        ({"pattern": "4:2"}, "pattern: expected n:m"),
        ({"pattern": "2:4", "share": 0.5}, "share: pattern 2:4 says it already, 0.5; give one of the two"),
    ):
        with pytest.raises(InputError) as caught:
            build_conversion("magnitude", **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
