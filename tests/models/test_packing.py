"""Packed documents in models: what the laws do not reach (pooled, both ways, padding beside them, refusals)."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model
from contextlab.errors import InputError
from contextlab.policies import build_policy

SMALL = {"width": 16, "depth": 2, "read_in": "token", "input_size": 11, "output_size": 7}
ENDS = torch.tensor([0, 5, 6, 15, 18])
TOKENS = torch.randint(11, (1, 18), generator=torch.Generator().manual_seed(0))
DOCUMENTS = TOKENS.tensor_split(ENDS[1:-1], 1)


@pytest.mark.parametrize("pool", ["mean", "first", "last", "attention", None])
@pytest.mark.parametrize("layer", ["attention", "encoder_attention", "fnet"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_pooled_models_and_encoders(layer, pool, position):
    model = build_model(dict(SMALL), layers=[layer], pool=pool, position=position, max_length=9).double()
    expected = torch.cat([model(document) for document in DOCUMENTS], 0 if pool else 1)
    torch.testing.assert_close(model(TOKENS, cu_seqlens=ENDS), expected, rtol=1e-9, atol=1e-9)
    if pool:
        with pytest.raises(InputError, match="^cu_seqlens: a pooled read-out has nothing to pool in an empty document"):
            model(TOKENS, cu_seqlens=torch.tensor([0, 5, 5, 18]))


@pytest.mark.parametrize("name", ["transformer", "mamba2", "gated_delta_net"])
def test_rows_with_padding_and_positions_that_begin_again(name):
    """As trainers of transformers give them: 1 at padding; the first row holds two documents, the second one."""
    model = build_model(name, **{**SMALL, "width": 64}).double().eval()
    x = TOKENS.view(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0]]).bool()
    places = torch.tensor([[1, 1, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 1, 1, 1]])
    got = model(x, mask, position_ids=places)
    for row, part in ((0, slice(2, 5)), (0, slice(5, 9)), (1, slice(0, 6))):
        torch.testing.assert_close(got[row, part], model(x[row : row + 1, part])[0], rtol=1e-9, atol=1e-9)
    assert not got[~mask].any()
    ordinary = torch.arange(9)[None]
    assert model(x, position_ids=ordinary).equal(model(x))
    counted = (mask.long().cumsum(1) - 1).masked_fill(~mask, 1)
    assert model(x, mask, position_ids=counted).equal(model(x, mask))


def test_a_policy_is_heeded():
    model = build_model("transformer", **SMALL).double().eval()
    with build_policy("streaming_llm", budget=1.0).attach(model), torch.no_grad():
        expected = torch.cat([model(document) for document in DOCUMENTS], 1)
        torch.testing.assert_close(model(TOKENS, cu_seqlens=ENDS), expected, rtol=1e-9, atol=1e-9)


def test_nothing_of_one_document_reaches_another():
    """Not even NaN."""
    model = build_model(dict(SMALL), read_in="vector", input_size=3)
    x = torch.randn(1, 18, 3)
    x[0, 7] = float("nan")
    bad = model(x, cu_seqlens=ENDS).isnan().any(-1)[0]
    assert bad[7:15].all()
    assert not bad[:6].any()
    assert not bad[15:].any()


def test_what_is_no_packing_is_refused():
    model = build_model("transformer", **SMALL)
    places = torch.arange(18)[None]
    _, state = model.read(TOKENS)
    mask = torch.ones(1, 18, dtype=torch.bool)
    for message, call in {
        "cu_seqlens: packed documents have no padding": lambda: model(TOKENS, mask, cu_seqlens=ENDS),
        "cu_seqlens: packed documents are read from the start": lambda: model.read(TOKENS, state, cu_seqlens=ENDS),
        "cu_seqlens: packed documents stand in one row": lambda: model(TOKENS.view(2, 9), cu_seqlens=ENDS),
        r"position_ids: expected integers \[1, 18\], got int64 \[1, 17\]": lambda: model(
            TOKENS, position_ids=places[:, 1:]
        ),
        "position_ids: expected 0, got 1 in row 0 at token 0": lambda: model(TOKENS, position_ids=places + 1),
        "position_ids: expected 3, or 0 where a document begins, got 4 in row 0 at token 3": lambda: model(
            TOKENS, position_ids=places + (places > 2)
        ),
        "position_ids: they begin again at other tokens": lambda: model(TOKENS, cu_seqlens=ENDS, position_ids=places),
    }.items():
        with pytest.raises(InputError, match=f"^{message}"):
            call()
