"""Of equal scores the later token or page is kept, whoever asks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.policies import AdaKV, BlockTopK, EvictionPolicy, Seen
from contextlab.policies.core.ranking import best, coarse, in_order
from contextlab.testing.policies import model, read, tokens


def by_hand(scores: Tensor, count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), -i))[:count]


@pytest.mark.parametrize("few", [0, 256])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_the_highest_are_found_and_of_equal_ones_the_later(
    levels: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("contextlab.policies.core.ranking.FEW", few)
    generator = torch.Generator().manual_seed(levels)
    for _ in range(20):
        scores = torch.randint(0, levels, (2, 3, 17), generator=generator).float()
        scores[0, 0, :9], scores[1, 1, 4] = -math.inf, math.inf
        for count in (0, 1, 5, 17):
            ordered, some = in_order(scores, count), best(scores, count)
            for row in range(2):
                for head in range(3):
                    expected = by_hand(scores[row, head], count)
                    assert ordered[row, head].tolist() == expected
                    real = [i for i in expected if scores[row, head, i] > -math.inf]
                    got = [i for i in some[row, head].tolist() if scores[row, head, i] > -math.inf]
                    assert sorted(got) == sorted(real)
                    assert len(set(some[row, head].tolist())) == count


def test_rounding_does_not_part_equal_scores() -> None:
    x = torch.tensor([1.0, 1 + 2**-22, 1 + 2**-10, -3.7, 0.0, math.inf], dtype=torch.float64)
    assert coarse(x)[0] == coarse(x)[1] < coarse(x)[2]
    assert coarse(x)[4:].tolist() == [0, math.inf]
    torch.testing.assert_close(coarse(x)[:4], x[:4], rtol=2**-16, atol=0)


class Indifferent(EvictionPolicy):
    def score(self, seen: Seen) -> Tensor:
        return torch.ones_like(seen.keys[..., 0])


class IndifferentPages(BlockTopK):
    def relevance(self, q: Tensor, summary: dict[str, Tensor]) -> Tensor:
        return torch.ones_like(super().relevance(q, summary))


@pytest.mark.parametrize("policy", [Indifferent, lambda **more: AdaKV(of=Indifferent(**more), floor=0, page=1)])
def test_what_is_indifferent_keeps_the_last_tokens(policy: Any) -> None:
    made = policy(sinks=2, window=3).with_budget("12tok")
    with made.attach(model()) as reader, torch.no_grad():
        _, state = reader.read(tokens(2, 40))
    places = state.layers[0].positions if isinstance(made, Indifferent) else torch.tensor(state.layers[0].places())
    assert (places == torch.tensor([0, 1, *range(30, 40)])).all()


def test_of_equal_pages_the_last_are_read() -> None:
    policy = IndifferentPages(budget="16tok", window=4, page=4)
    chosen = []
    pages = policy._pages

    def noted(*given: Any) -> Tensor | None:
        found = pages(*given)
        chosen.append(found)
        return found

    policy._pages = noted  # type: ignore[method-assign]
    with policy.attach(model()) as reader:
        read(reader, tokens(2, 41), [40])
    assert (chosen[-1].sort(-1).values == torch.tensor([7, 8])).all()  # of 0 to 8
