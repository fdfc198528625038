"""The stack written apart, which the law of models stands on, against the stack, at each of its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contextlab.models import ModelSpec, build_model
from contextlab.testing.plain import plain_stack

BASE = {"width": 8, "depth": 2, "heads": 2, "read_in": "token", "input_size": 11, "output_size": 5, "max_length": 16}


@pytest.mark.parametrize(
    "options",
    [
        {"position": "sinusoidal"}, {"position": "learned"}, {"norm": "layer"}, {"norm": "none"}, {"block": "parallel"},
        {"loops": 3}, {"loops": 2, "input_injection": True}, {"output_size": 11, "tied": True}, {"mlp": "none"},
        {"read_in": "vector"}, {"layers": ["delta_net"]}, {"layers": ["encoder_attention"], "pool": "mean"},
    ],
    ids=str,
)  # fmt: skip
def test_it_is_the_stack(options: dict[str, Any]) -> None:
    spec = ModelSpec.parse({**BASE, **options})
    model = build_model(spec, seed=3).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
        inputs = torch.randint(11, (2, 13)) if spec.read_in == "token" else torch.randn(2, 13, 11).double()
        torch.testing.assert_close(plain_stack(spec, model, inputs), model(inputs), rtol=0, atol=1e-9)
