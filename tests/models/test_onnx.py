"""ONNX programs of our models in onnxruntime, against the models; runs where onnx, onnxscript and onnxruntime are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from contextlab import build_model

for each in ("onnx", "onnxscript"):
    pytest.importorskip(each)
onnxruntime = pytest.importorskip("onnxruntime")

SIZES = {"width": 16, "depth": 1, "heads": 2, "read_in": "token", "input_size": 17, "output_size": 17}


def answers(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})[0]
    return torch.from_numpy(found)


@pytest.mark.parametrize("name", ["transformer", "gated_delta_net"])
def test_a_program_of_one_length_gives_what_the_model_gives(name: str, tmp_path: Path) -> None:
    model = build_model(name, **SIZES).eval()
    tokens = torch.randint(17, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.onnx.export(model, (tokens,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    other = torch.randint(17, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(answers(tmp_path / "model.onnx", other), model(other), rtol=0, atol=1e-5)


def test_a_program_of_full_attention_takes_any_length(tmp_path: Path) -> None:
    model = build_model("transformer", **SIZES).eval()
    tokens = torch.randint(17, (2, 20), generator=torch.Generator().manual_seed(0))
    lengths = ({1: torch.export.Dim("length", min=2, max=512)},)
    torch.onnx.export(model, (tokens,), dynamo=True, verbose=False, dynamic_shapes=lengths).save(
        tmp_path / "model.onnx"
    )
    for length in (3, 150):
        other = torch.randint(17, (2, length), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(answers(tmp_path / "model.onnx", other), model(other), rtol=0, atol=1e-5)
