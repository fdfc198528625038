"""Queries: one example a prompt that is asked for, drawn otherwise than those before it (Garg et al., 2208.01066)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Query = Literal["same", "random", "orthogonal", "random_quadrants", "opposite_quadrants", "overlapping"]


def ask(kind: Query, xs: Tensor, active: int, directions: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make one x of each prompt, the second or a later one, a query of this kind.

    kind: not "same". "random": drawn as the others; "orthogonal": orthogonal to all x before it, its length kept (one
        of the first `directions`, so that there is such an x); "random_quadrants": the x before it have the signs of
        one random pattern of the prompt, it has its own; "opposite_quadrants": it has the opposite signs;
        "overlapping": it is one of the x before it, any with the same chance.
    xs: [B, n, d], zero beyond `active` dimensions.
    directions: dimensions that the x of a prompt span.

    Returns the changed xs, and scored [B, n] bool: the query alone.
    """
    batch, examples, size = xs.shape
    most = min(directions, examples) - 1 if kind == "orthogonal" else examples - 1
    cut = torch.randint(1, most + 1, (batch, 1), generator=generator, device=xs.device)
    scored = torch.arange(examples, device=xs.device) == cut
    if kind == "random":
        return xs, scored
    old = xs[scored]
    if kind == "orthogonal":
        query = F.pad(_orthogonal(xs[:, :most, :active], cut, old[:, :active]), (0, size - active))
    elif kind == "overlapping":
        which = (torch.rand(batch, generator=generator, device=xs.device) * cut[:, 0]).long()
        query = xs[torch.arange(batch, device=xs.device), which]
    else:
        signs = torch.randint(2, (batch, 1, size), generator=generator, device=xs.device).to(xs) * 2 - 1
        xs = xs.abs() * signs
        query = old if kind == "random_quadrants" else -xs[scored]
    changed = xs.clone()
    changed[scored] = query
    return changed, scored


def _orthogonal(before: Tensor, cut: Tensor, query: Tensor) -> Tensor:
    """The part of each query [B, a] orthogonal to the first `cut` [B, 1] of before [B, n, a], at the query's length."""
    # The first c columns of Q span the first c xs, for every c.
    basis = torch.linalg.qr(before.double().mT).Q
    basis = basis * (torch.arange(before.shape[1], device=before.device) < cut).unsqueeze(1)
    part = query.double()
    for _ in range(2):  # once more removes what rounding left when little of x remains
        part = part - (basis @ (basis.mT @ part.unsqueeze(-1))).squeeze(-1)
    return (part * (query.double().norm(dim=1) / part.norm(dim=1)).unsqueeze(1)).to(query.dtype)
