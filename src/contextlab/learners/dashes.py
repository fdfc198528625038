"""The dashes of Pathfinder's curves, drawn once for each direction, and the steps from one to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES = 4
"""Points along the side of a pixel, of which those that a shape covers make its grey level."""


def cover(distance: Tensor, reach: float) -> Tensor:
    """The share of each pixel's points within `reach`. distance: [..., points] -> [...]."""
    return (distance <= reach).float().mean(-1)


def points(radius: int) -> Tensor:
    """The sample points of the pixels at most `radius` away on either axis, [pixels, points, 2], (y, x).

    There are (2 radius + 1)^2 pixels.
    """
    pixel = torch.arange(-radius, radius + 1, dtype=torch.float64)
    inside = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES - 0.5
    line = pixel.unsqueeze(1) + inside
    y = line[:, None, :, None].expand(-1, len(pixel), -1, SAMPLES)
    x = line[None, :, None, :].expand(len(pixel), -1, SAMPLES, -1)
    return torch.stack([y, x], -1).flatten(2, 3).flatten(0, 1)


@dataclass(frozen=True)
class Steps:
    """Where dashes lie. All places are whole pixels (y, x); angles are in radians from the x axis to the y axis.

    A dash swings around a pivot: it ends at pivot + `ends[k]`, points in the direction `angles[k]`, and the pivot of
    the dash after it is pivot + `shifts[k]`. The first dash of a curve starts at its tip in one of 360 directions:
    `first_angles`, and the pivot of the second is tip + `first_shifts`.

    dash: length in pixels. gap: half the distance between two dashes.
    """

    dash: int
    gap: int
    ends: Tensor  # [K, 2]
    angles: Tensor  # [K]
    shifts: Tensor  # [K, 2]
    first_ends: Tensor  # [360, 2]
    first_angles: Tensor  # [360]
    first_shifts: Tensor  # [360, 2]

    @classmethod
    def of(cls, dash: int, gap: int) -> Steps:
        """Directions are as many as the circle of radius dash + gap has pixels; the published generator's rounding."""
        radius = dash + gap
        turn = torch.arange(0, 2 * math.pi, 1 / radius, dtype=torch.float64)
        ends = torch.unique((radius * _unit(turn)).floor().long(), dim=0)
        angles = torch.atan2(ends[:, 0].double(), ends[:, 1].double())
        first = torch.arange(-180, 180, dtype=torch.float64) * math.pi / 180
        first_ends = (dash * _unit(first)).ceil().long()
        pivots = first_ends + (-radius * _unit(first)).ceil().long()
        step = dash + 2 * gap
        shifts, first_shifts = ((step * _unit(each)).ceil().long() for each in (angles, first))
        return cls(dash, gap, ends, angles, shifts, first_ends, first, pivots + first_shifts)

    def to(self, device: torch.device | str) -> Steps:
        """The same on a device."""
        tensors = (
            self.ends, self.angles, self.shifts, self.first_ends, self.first_angles, self.first_shifts,
        )  # fmt: skip
        return Steps(self.dash, self.gap, *(each.to(device) for each in tensors))

    def turns(self, before: Tensor, continuity: float) -> Tensor:
        """Weights of the directions after a dash of direction `before`: [...] -> [..., K], larger if straighter."""
        turn = (self.angles - before.unsqueeze(-1)).abs()
        turn = torch.minimum(turn, 2 * math.pi - turn)
        return (turn * continuity).clamp_max(math.pi / 2).cos().clamp_min(0).square()

    def radius(self, thickness: float) -> int:
        """Of the stamps of `drawn`."""
        return self.dash + math.ceil(thickness) + self.gap

    def drawn(self, angles: Tensor, thickness: float, wider: float = 0.0, backwards: bool = False) -> Tensor:
        """The share that each pixel of a dash covers, [A, pixels] of A angles; it starts in the middle.

        wider: by how much it reaches further on all sides. backwards: the middle is where it ends.
        """
        at = points(self.radius(thickness)).to(angles.device)
        way = _unit(angles) * (-1 if backwards else 1)
        along = (torch.einsum("psc,kc->kps", at, way)).clamp(0, self.dash)
        apart = (at - along.unsqueeze(-1) * way[:, None, None]).norm(dim=-1)
        return cover(apart, thickness / 2 + wider)


def _unit(angle: Tensor) -> Tensor:
    return torch.stack([angle.sin(), angle.cos()], -1)
