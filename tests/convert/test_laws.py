"""Every registered conversion is held to the laws, on several mixers; and the laws bite."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from contextlab import build_model, registry
from contextlab.convert import Calibration, Conversion, Converted, build_conversion
from contextlab.convert.base import Change, copied
from contextlab.convert.methods import read_method
from contextlab.errors import InputError
from contextlab.testing import LawBroken, laws, parametrize_with_laws
from contextlab.testing.conversions import cases, small_model, tokens


@parametrize_with_laws("conversion")
def test_conversions_keep_the_laws(law):
    law()


@dataclass(frozen=True)
class Broken(Conversion):
    """Does what no conversion may."""

    fault: str = ""
    count: int = 1

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
            elif self.fault == "nothing cut in silence":
                weight[: min(self.count, 2)] = 0
            elif self.fault == "reads on":
                made.blocks[0].mlp.register_forward_hook(lambda mlp, given, y: y + y.flip(1))
            else:
                weight.mul_(0.5)
        where = "blocks.9" if self.fault == "lines" else "blocks.0.mlp.up"
        did = f"halved, {self.count} times" if self.fault != "nothing cut in silence" else "halved"
        return Converted(made, [Change(where, did, 0.5, "weights", weight.nbytes, weight.nbytes)])


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


FAULTS = ["plan", "old model", "lines", "same seed", "saved", "reads on", "after another", "nothing cut in silence"]


@pytest.mark.parametrize("name", FAULTS)
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


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("svd:rank=1000", "rank 1000: two factors of it take fewer numbers in no layer; at most 11, in blocks.0.mixer"),
        ("svd_llm:ratio=1", "ratio: input should be less than 1"),
        (
            "rtn:group=33",
            "group 33: divides the inputs of no layer (16, 32); the nearest that does is 32, and",
        ),
        ("gptq:group=5", "group 5: divides the inputs of no layer (16, 32); the nearest that does is 4"),
        ("heads:share=0.1", "heads: share 0.1 of 2 key heads is none of them; the least that cuts one is 0.5"),
        ("merge_blocks:size=9", "has at most 3 alike in a row; give size=3"),
        ("merge_blocks:times=4,size=2", "of 1 blocks by then, has at most 1 alike in a row; give times=2"),
        ("share_kv:every=4", "share_kv: every 4 is more than the 3 layers that can share"),
        ("window:window=100", "window 100: the model reads 32 tokens and no more; expected at most 32"),
        ("lolcats:window=64", "window 64: the model reads 32 tokens and no more; expected at most 32"),
        ("stack:times=9999", "times: a model applies at most 10000 layers, 3333 times the 3 of this one, got 9999"),
    ],
)
def test_what_is_more_than_the_model_has_is_refused_with_the_nearest_that_fits(method, message):
    spec = small_model().spec.model_copy(update={"position": "learned", "max_length": 32})
    with pytest.raises(InputError) as caught:
        read_method(method, "shrink").plan(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_used_in_place_of_what_does_not_divide_is_told():
    sizes = {"width": 48, "depth": 3, "heads": 2, "mlp_ratio": 2, "read_in": "token", "input_size": 12}
    model = build_model({**sizes, "output_size": 12}).double()

    def told(name, layer, data=None, **options):
        lines = build_conversion(name, **options)(model, data).lines
        return next(line.did for line in lines if line.layer == f"blocks.0.{layer}")

    assert told("rtn", "mlp.up", layers="*.mlp.*").endswith("bits a weight, in one group of 48")  # of the default, 64
    assert told("rtn", "mlp.out_proj", layers="*.mlp.*").endswith("bits a weight, the last group of 32")
    assert told("rtn", "mlp.out_proj", layers="*.mlp.*", group=48).endswith("bits a weight")
    assert told("share_kv", "mixer", every=2) == "keys and values for layers 0, 1"
    only = "blocks.0.mlp.up"
    data = Calibration.of_tokens(tokens(), batch=2)
    assert told("outliers", "mlp.up", data, layers=only, share=0.1, group=16).endswith("weight, 5 of 48 inputs dense")
    assert told("light_transfer", "mixer", data, layers=[0], window=4, last=9).endswith("by the last 9 queries")
    assert told("lizard", "mixer", layers=[0], window=4).startswith("to lizard:window=4,meta_tokens=4: carried")
