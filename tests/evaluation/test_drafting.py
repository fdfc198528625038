"""What drafting gives is told as it is counted."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model
from contextlab.errors import InputError
from contextlab.evaluation import time_drafts
from contextlab.models import generate_drafted

SIZES = {"width": 16, "depth": 3, "heads": 2, "input_size": 11, "output_size": 11, "read_in": "token"}
PROMPTS = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))


def test_shares_are_of_all_prompts_and_each_has_a_turn():
    model = build_model(SIZES, seed=1).double()
    told = time_drafts(model, PROMPTS, 9, [{"layers": 1, "ahead": 3}, {"layers": 2}], seconds=0)
    assert model.training
    for one, draft in zip(told, ({"layers": 1, "ahead": 3}, {"layers": 2, "ahead": 4}), strict=True):
        found = [generate_drafted(model.eval(), row[None], 9, draft) for row in PROMPTS]
        assert (one.layers, one.ahead, one.prompts, one.tokens) == (draft["layers"], draft["ahead"], 4, 9)
        assert one.acceptance == sum(each.accepted for each in found) / sum(each.drafted for each in found)
        assert one.per_pass == 4 * 8 / sum(each.passes for each in found)
        assert one.same == 1
        assert one.turns == 4
        assert all(0 < low <= middle <= high for low, middle, high in (one.plain, one.drafted, one.ratio))
    assert told[0].per_pass != told[1].per_pass


def test_what_cannot_be_is_refused_before_anything_is_timed():
    model = build_model(SIZES)
    with pytest.raises(InputError, match=r"draft\.layers: 3 of 3 layers"):
        time_drafts(model, PROMPTS, 9, [{"layers": 1}, {"layers": 3}], seconds=1e9)
    with pytest.raises(InputError, match="prompts: expected at least one, got none"):
        time_drafts(model, [], 9, [{"layers": 1}])
    with pytest.raises(InputError, match="tokens"):
        time_drafts(model, PROMPTS, 1, [{"layers": 1}])
