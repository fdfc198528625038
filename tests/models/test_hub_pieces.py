"""What is said of models whose answers in pieces differ from those of the whole."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from contextlab.models.hub_model import HuggingFaceModel
from contextlab.models.hub_pieces import APART

from .checkpoints import reference


@pytest.mark.parametrize("kind", ["deepseek_v32", "moshi"])
def test_a_difference_is_said_once_and_where_it_begins(kind):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    from tests.soak.causal import model_of

    if kind not in known:
        pytest.skip(f"this release of transformers has no {kind}")
    model = HuggingFaceModel(model_of(kind))
    limit = getattr(model.model.config.get_text_config(), APART[kind].beyond)
    tokens = torch.randint(3, 40, (1, limit + 2), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.read(tokens)  # the whole is what it is
            _, state = model.read(tokens[:, :-3])
            _, state = model.read(tokens[:, -3:-2], state)
        assert state.length == limit
        with pytest.warns(UserWarning, match=f"{kind}: answers in pieces differ .* by up to {APART[kind].error:g} of"):
            _, state = model.read(tokens[:, -2:-1], state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.read(tokens[:, -1:], state)


def test_nothing_is_said_of_models_that_do_not_differ():
    model = HuggingFaceModel(reference("llama"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        _, state = model.read(torch.zeros(1, 9, dtype=torch.int64))
        model.read(torch.zeros(1, 1, dtype=torch.int64), state)
