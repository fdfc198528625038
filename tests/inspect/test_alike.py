"""Heads that look alike: correlations by their definition, and groups as scipy makes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from contextlab.inspect.alike import groups_of, head_correlations


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_correlations_are_of_rows_without_their_means():
    matrix = drawn(2, 3, 5, 5).tril()
    found = head_correlations(matrix)
    for row in range(2):
        flat = []
        for head in range(3):
            entries = []
            for place in range(5):
                own = matrix[row, head, place, : place + 1]
                own = own / own.abs().sum()
                entries += (own - own.mean()).tolist()
            flat.append(entries)
        np.testing.assert_allclose(found[row].numpy(), np.corrcoef(flat), atol=1e-12)


def test_heads_that_look_at_all_alike_are_like_no_other():
    matrix = torch.ones(1, 2, 4, 4, dtype=torch.float64).tril()
    assert head_correlations(matrix).abs().max() == 0
    both = drawn(1, 2, 4, 4)
    assert head_correlations(both, causal=False)[0, 0, 0] == pytest.approx(1)


def test_groups_are_those_of_complete_linkage():
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    for seed in range(20):
        known = np.corrcoef(drawn(7, 5, seed=seed).numpy())
        for alike in (0.1, 0.5, 0.8):
            found = groups_of(known, alike)
            distances = 1 - known[np.triu_indices(7, 1)]
            labels = hierarchy.fcluster(hierarchy.linkage(distances, "complete"), 1 - alike, "distance")
            wanted = sorted([head for head in range(7) if labels[head] == label] for label in set(labels))
            assert found == wanted


def test_each_two_heads_of_a_group_are_alike():
    chain = np.array([[1, 0.95, 0.2], [0.95, 1, 0.92], [0.2, 0.92, 1]])
    assert groups_of(chain, 0.9) == [[0, 1], [2]]  # 1 and 2 are alike, 0 and 2 are not
    assert groups_of(chain, 0.1) == [[0, 1, 2]]
