"""Scores of matrices that tell which token looks at which: how much of the looking goes where, over prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from contextlab.evaluation.intervals import Z95, share_bounds


class Over(NamedTuple):
    """Means over prompts, [H] each, with their 95% intervals; nan where there is one prompt."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def places_of(inputs: Tensor) -> dict[str, Tensor]:
    """Score -> where each token would look, [B, T, T] bool; of vectors those alone that need no tokens.

    inputs: token ids [B, T] int64, or vectors [B, T, d].
    """
    at = torch.arange(inputs.shape[1], device=inputs.device)
    back = (at[:, None] - at).expand(len(inputs), -1, -1)
    first = ((at[None, :] == 0) & (at[:, None] > 0)).expand_as(back)
    places = {"previous": back == 1, "same": back == 0}
    if inputs.ndim == 2:
        alike = (inputs[:, :, None] == inputs[:, None, :]) & (back > 0)
        followed = _later(alike) & (back >= 0)
        before = _later(alike.transpose(1, 2)).transpose(1, 2)  # that are the symbol before the token
        twice = followed & _later(_later(before))
        # Where all that followed the last symbol also followed the last two, nothing parts the two kinds of heads.
        parted = (followed & ~twice).any(-1, keepdim=True)
        places |= {"duplicate": alike, "induction": followed, "bigram": twice & parted}
    return {**places, "first": first}


def _later(where: Tensor) -> Tensor:
    """The places [B, T, T] one token after those."""
    moved = torch.zeros_like(where)
    moved[:, :, 1:] = where[:, :, :-1]
    return moved


def shares(matrix: Tensor) -> Tensor:
    """A matrix [..., T, T] in absolute values, each row made to sum to 1; float64."""
    size = matrix.abs().double()
    return size / size.sum(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def looks(share: Tensor, places: Mapping[str, Tensor]) -> dict[str, Over]:
    """Score -> the mean share of each head that goes there, over the tokens that have such a place to look at.

    share: [B, H, Q, T] of Q of the T tokens. places: score -> [B, Q, T] bool. Scores for which no token has a place are
    left out.
    """
    found = {}
    for score, where in places.items():
        counts = where.any(-1).sum(-1).double()  # [B]
        if counts.any():
            found[score] = ratio(torch.einsum("bhqt,bqt->bh", share, where.double()), counts[:, None])
    return found


def ratio(sums: Tensor, counts: Tensor) -> Over:
    """Shares as ratios of means over prompts, sums [B, H] over counts [B, 1 or H], with their intervals."""
    value, half, number = ratio_of_means(sums, counts)
    if number < 2:
        return Over(value, *(np.full_like(value, np.nan) for _ in range(2)))
    value = np.clip(value, 0.0, 1.0)  # rounding
    return Over(value, *share_bounds(value, half, np.full(value.shape, number)))


def ratio_of_means(sums: Tensor, counts: Tensor) -> tuple[np.ndarray, np.ndarray, int]:
    """The ratio of two means over prompts, the half-width of its 95% interval (delta method), and how many tell of it.

    sums: [B, H]. counts: [B, 1 or H]; a prompt in which nothing is counted tells nothing.
    """
    told = counts.ne(0).any(-1)
    sums, counts = sums[told].double(), counts[told].double()
    value = sums.mean(0) / counts.mean(0)
    off = (sums - value * counts).std(0) / counts.mean(0).abs() if len(sums) > 1 else torch.full_like(value, torch.nan)
    half = Z95 * off / len(sums) ** 0.5
    return value.cpu().numpy(), half.cpu().numpy(), len(sums)
