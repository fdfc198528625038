"""What the laws of mixers are put to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contextlab.testing import components


@pytest.mark.parametrize("name", ["gated_delta_net", "mamba2", "forgetting_attention"])
def test_the_laws_read_mixers_whose_every_parameter_counts(name: str) -> None:
    """Parts that start at zero, at one or as one another are moved; those that are asked for without noise are not."""
    built: Any = components("mixer", name)[0].build

    def values(**options: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [each.detach().flatten() for each in built(**options).parameters()]

    plain, moved = values(noise=False), values()
    assert all(len(each.unique()) == each.numel() for each in moved)
    assert any(len(each.unique()) < each.numel() for each in plain)
    assert not any(torch.equal(one, other) for one, other in zip(plain, moved, strict=True))
