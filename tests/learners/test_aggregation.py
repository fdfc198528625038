"""The mean of learners, weighed by their errors on the examples so far."""

from __future__ import annotations

import math

import pytest
import torch

from contextlab import InputError
from contextlab.learners import Averaging, ExponentialWeights, Ridge


def test_it_weighs_by_the_errors_on_each_example_before():
    generator = torch.Generator().manual_seed(0)
    xs, ys = (torch.randn(2, 7, size, generator=generator, dtype=torch.float64) for size in (3, 2))
    members = (Ridge(0.5), Averaging())
    said = [member.predict(xs, ys) for member in members]
    found = ExponentialWeights(members, 0.3).predict(xs, ys)
    for row in range(2):
        for i in range(7):
            weights = [
                math.exp(-0.3 * sum(float((each[row, j] - ys[row, j]).square().sum()) for j in range(i)))
                for each in said
            ]
            wanted = sum(w * each[row, i] for w, each in zip(weights, said, strict=True)) / sum(weights)
            torch.testing.assert_close(found[row, i], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("members", [(), ("ridge",)])
def test_members_must_predict_from_examples(members):
    with pytest.raises(InputError, match="members: give at least one learner") as caught:
        ExponentialWeights(members)
    assert "\n" not in str(caught.value)
