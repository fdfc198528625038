"""Heads that copy: written down, by the product of the weights, and where no product tells it."""

from __future__ import annotations

import pytest
import torch

from contextlab import ModelSpec, build_model
from contextlab.inspect.copies import copying_scores


def model_of(layer, **more):
    fields = {"width": 12, "depth": 1, "heads": 2, "read_in": "token", "input_size": 7, "output_size": 7, **more}
    return build_model(ModelSpec(layers=[layer], **fields)).double().eval()


def test_the_head_that_is_written_to_copy_does_and_the_one_before_does_not():
    model = build_model("induction_construction", vocabulary=8, length=24)
    found, reasons = copying_scores(model)
    assert not reasons
    assert found["blocks.1.mixer"].item() == pytest.approx(1, abs=1e-6)
    assert found["blocks.0.mixer"].item() == 0  # it tells the next layer, and no logit
    with torch.no_grad():
        model.blocks[1].mixer.out_proj.weight.neg_()
    assert copying_scores(model)[0]["blocks.1.mixer"].item() == pytest.approx(-1, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_scores_are_those_of_the_whole_matrix_over_the_vocabulary(norm, kv_heads):
    model = model_of({"mixer": "attention", "options": {"heads": 2, "kv_heads": kv_heads, "bias": True}}, norm=norm)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    mixer, size = model.blocks[0].mixer, 6
    embedded = model.blocks[0].mixer_norm(model.read_in.weight)
    value = mixer.qkv_proj.weight[12 + kv_heads * size :]
    read_out = model.read_out.weight * getattr(model.read_out_norm, "weight", torch.ones(12, dtype=torch.float64))
    if norm == "layer":
        read_out = read_out - read_out.mean(1, keepdim=True)
    read_out = read_out - read_out.mean(0)
    wanted = []
    for head in range(2):
        own = slice(head * size, head * size + size)
        written = value[:size] if kv_heads == 1 else value[own]
        eigenvalues = torch.linalg.eigvals(read_out @ mixer.out_proj.weight[:, own] @ written @ embedded.T)
        wanted.append(eigenvalues.real.sum() / eigenvalues.abs().sum())
    torch.testing.assert_close(copying_scores(model)[0]["blocks.0.mixer"], torch.stack(wanted), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("gated_delta_net", "values are not linear"),
        ("retention", "answers are not linear"),
        ({"mixer": "attention", "options": {"output_gate": True}}, "answers are not linear"),
        ({"mixer": "attention", "options": {"short_conv": 3}}, "values are not linear"),
        ("lstm", "names no values"),
    ],
)
def test_where_no_matrix_tells_it_the_reason_is_told(layer, reason):
    found, reasons = copying_scores(model_of(layer))
    assert not found
    assert reason in reasons["blocks.0.mixer"]


def test_models_that_read_vectors_copy_no_tokens():
    model = build_model("transformer", width=8, depth=1, heads=2, input_size=3, output_size=1)
    assert copying_scores(model) == ({}, {"blocks.0.mixer": "logits are not of the tokens that are read"})
