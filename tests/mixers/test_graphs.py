"""Mixers as one graph of torch, and with a length left open; `tests/soak/graphs.py` tries them all."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model
from contextlab.testing import components
from contextlab.testing.readings import WIDTH
from tests.soak.graphs import Alone, one_graph, open_length, reason, tried


def alone(name):
    return Alone(components("mixer", name)[0].build().float().eval())


@pytest.mark.parametrize("name", ["attention", "block_local", "gla"])
@torch.no_grad()
def test_a_mixer_is_one_graph(name):
    assert one_graph(alone(name)) == "right"


@torch.no_grad()
def test_layers_that_share_a_state_are_one_graph():
    torch._dynamo.reset()
    sizes = {"width": 16, "depth": 2, "heads": 2, "read_in": "token", "input_size": 9, "output_size": 9}
    model = build_model("cross_layer_attention", **sizes)
    tokens = torch.arange(8)[None]
    compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


@torch.no_grad()
def test_an_exported_length_is_right_or_refused():
    assert open_length(alone("attention")) == "right"
    assert open_length(alone("linear_attention")) == "up to 128 tokens"


@torch.no_grad()
def test_a_wrong_answer_is_told():
    model = alone("attention")
    assert tried(lambda x: model(x) * 1.01, model, (5,)).startswith("WRONG: ")
    assert tried(lambda x: x[..., : WIDTH + 1].view(7), model, (5,)).startswith("WRONG: RuntimeError")
    assert reason(RuntimeError("Guard failed: x.size()[1] <= 64")) == "up to 64 tokens"
    assert reason(RuntimeError("anything else")) is None
