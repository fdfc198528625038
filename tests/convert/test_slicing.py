"""A narrower stream: exact where nothing is cut; else the model whose stream is projected, with its eigenvectors."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model
from contextlab.convert import build_conversion
from contextlab.errors import InputError
from contextlab.testing.conversions import calibration, tokens

SIZES = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2, "input_size": 12, "output_size": 12, "read_in": "token"}
MODELS = {
    "plain": {},
    "parallel, tied": {"block": "parallel", "tied": True, "mlp": "swiglu", "norm_eps": 1e-3},
    "rich": {
        "layers": [{"mixer": "attention", "options": {"bias": True, "output_gate": True, "short_conv": 3}}, "none"],
        "position": "learned",
        "max_length": 32,
        "loops": 2,
    },
}


def noisy(changes):
    """In float64, with noise on every parameter, the weights of norms above all."""
    model = build_model({**SIZES, **changes}).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_sliced_model_is_the_one_whose_stream_is_projected(name):
    model, data = noisy(MODELS[name]), calibration()
    wanted = model(tokens())
    whole = build_conversion("slice", ratio=0)(model, data)
    torch.testing.assert_close(whole.model(tokens()), wanted, rtol=0, atol=1e-9)
    assert max(line.error for line in whole.lines) < 1e-9
    found = build_conversion("slice", ratio=0.25)(model, data)
    assert found.model.spec.width == 12
    assert found.model.state_nbytes(9) == model.state_nbytes(9)
    assert 0.7 < found.model.weight_nbytes / (model.weight_nbytes + 8 * 12 * 16 * model.spec.tied) < 0.8
    # By hand: the moments of x / rms(x) at every norm, their first eigenvectors, and P = Q Q^T on all that writes.
    moment = torch.zeros(16, 16, dtype=torch.float64)
    norms = [m for n, m in model.named_modules() if n.endswith("norm") and "mixer." not in n and hasattr(m, "weight")]

    def note(norm, given):
        eps = torch.finfo(torch.float64).eps if norm.eps is None else norm.eps
        x = (given[0] / (given[0].square().mean(-1, keepdim=True) + eps).sqrt()).reshape(-1, 16)
        moment.add_(x.T @ x)

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    for prompt, _ in data.batches:
        model(prompt.inputs)
    for hook in hooks:
        hook.remove()
    q = torch.linalg.eigh(moment).eigenvectors[:, 4:]
    project = q @ q.T
    if model.spec.tied:
        model.read_out.weight = torch.nn.Parameter(model.read_out.weight.clone())
    model.read_in.weight.copy_(model.read_in.weight @ project)
    if model.positions is not None:
        model.positions.weight.copy_(model.positions.weight @ project)
    for block in model.blocks:
        for part in (block.mixer, block.mlp):
            if hasattr(part, "out_proj"):
                part.out_proj.weight.copy_(project @ part.out_proj.weight)
                if part.out_proj.bias is not None:
                    part.out_proj.bias.copy_(project @ part.out_proj.bias)
    torch.testing.assert_close(found.model(tokens()), model(tokens()), rtol=0, atol=1e-9)
    assert not torch.allclose(found.model(tokens()), wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layer"}, "slice: the model has norm 'layer'; it is for RMSNorm"),
        ({"layers": ["gla"]}, "slice: the model has mixer 'gla'; it is for attention and MLPs"),
        ({"residual": "laurel"}, "slice: the model has residual 'laurel'"),
        ({"position": "sinusoidal"}, "slice: the model has sinusoidal positions"),
        ({"linear": [{"layers": "*", "form": "int"}]}, "not stored densely; slice before other methods"),
    ],
)
def test_what_cannot_be_rotated_is_one_line(changes, message):
    with pytest.raises(InputError) as caught:
        build_conversion("slice")(build_model({**SIZES, **changes}), calibration())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
