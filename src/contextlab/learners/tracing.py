"""Traces a dashed curve through an image from one mark to another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.answers import SMOOTHING
from contextlab.learners.dashes import Steps, cover, points
from contextlab.learners.text import token_ids
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

NOISE = 0.1
"""By how much of full brightness a dash may look different from one alone: others reach into its pixels."""
MIDDLE, SLOPE, SUREST = -5.5, 0.5, 3.0
"""The log-odds of "connected" are SLOPE times the evidence above MIDDLE, at most SUREST either way: they part
curves of 4 dashes on 18 x 18 pixels best, and do for 14 on 32 x 32."""
VISIBLE = 0.1
"""Brightness from which on a pixel of a dash is compared."""


@register("learner", "curve_tracer", family="images", papers=("2011.04006", "1805.08315"), cases=())
@dataclass(frozen=True, eq=False)
class CurveTracer(Learner):
    """Follows curves of dashes from either mark to the other: the forward algorithm of a hidden Markov model.

    A state is where a dash lies and in which direction. It goes on with the probabilities by which curves turn, and is
    seen by how well the image's pixels there fit that dash alone. What is compared is the weight of the traces of
    `segments` dashes that end at the other mark with that of those that end elsewhere. What it does not use: that
    curves keep away from each other. The options are those of the task `pathfinder`.
    """

    size: PositiveInt
    segments: Annotated[int, Field(ge=2)]
    dash: PositiveInt
    gap: PositiveInt
    continuity: Annotated[float, Field(ge=0)]
    thickness: Annotated[float, Field(gt=0)]
    marker: Annotated[float, Field(gt=0)]
    contrast: Annotated[float, Field(gt=0)]
    levels: Annotated[int, Field(ge=2)]

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, size * size, levels + 2], float32: at the last pixel of the two labels."""
        tokens = token_ids(prompt, self.levels + 2, "curve_tracer")
        if tokens.shape[1] != self.size**2:
            raise InputError(f"curve_tracer reads images of {self.size**2} pixels, this one has {tokens.shape[1]}")
        image = tokens.view(-1, self.size, self.size).float() / (self.levels - 1)
        evidence = torch.cat([self._evidence(part) for part in image.split(64)])
        odds = (SLOPE * (evidence - MIDDLE)).clamp(-SUREST, SUREST).float()
        log = torch.full((*tokens.shape, self.levels + 2), -math.log(self.levels + 2), device=tokens.device)
        log[:, -1] = math.log(SMOOTHING / self.levels)
        log[:, -1, -2:] = F.logsigmoid(torch.stack([-odds, odds], -1)) + math.log1p(-SMOOTHING)
        return log

    def _evidence(self, image: Tensor) -> Tensor:
        """Log of the weight of traces that end at the other mark over that of traces that end far from it, [B]."""
        steps = Steps.of(self.dash, self.gap).to(image.device)
        marks, free = self.marks(image)
        brightness = self.contrast / min(1.0, self.thickness)
        rim = steps.radius(self.thickness)
        seen, weight = (F.pad(each, (rim,) * 4) for each in (image, free.float()))
        later = (steps.drawn(steps.angles, self.thickness, backwards=True) * brightness).clamp_max(1)
        begun = (steps.drawn(steps.first_angles, self.thickness) * brightness).clamp_max(1)
        fit = self._fit(seen, weight, later)  # [B, K, y, x], by where a dash ends
        first = self._fit_first(seen, weight, begun, marks, rim)
        turns = steps.turns(steps.angles, self.continuity)
        turns = turns / turns.sum(1, keepdim=True).clamp_min(1e-12)
        begin = steps.turns(steps.first_angles, self.continuity)
        begin = begin / begin.sum(1, keepdim=True).clamp_min(1e-12)
        # by pivots, of which some lie beyond the image
        span = self.dash + 2 * self.gap + 1
        by_pivot = torch.stack(
            [_shifted(F.pad(fit[:, k], (span,) * 4), -steps.ends[k]) for k in range(len(steps.ends))], 1
        )
        wide = self.size + 2 * span
        reached = missed = torch.zeros(len(image), dtype=torch.float64, device=image.device)
        for mark, other in ((0, 1), (1, 0)):
            state = torch.zeros_like(by_pivot)
            pivot = marks[:, mark].unsqueeze(1) + steps.first_shifts + span
            inside = ((pivot >= 0) & (pivot < wide)).all(-1)
            flat = (pivot.clamp(0, wide - 1) * pivot.new_tensor([wide, 1])).sum(-1)
            weights = first[:, mark] * inside / 360
            start = torch.einsum("bo,ok->bko", weights.double(), begin)
            state = state.flatten(2).scatter_add(2, flat.unsqueeze(1).expand_as(start), start).view_as(state)
            state = state * by_pivot
            for _ in range(self.segments - 2):
                moved = torch.stack([_shifted(state[:, k], steps.shifts[k]) for k in range(state.shape[1])], 1)
                state = torch.einsum("bkyx,kj->bjyx", moved, turns) * by_pivot
            away = torch.arange(wide, device=image.device) - span - marks[:, other].unsqueeze(2)  # [B, 2, wide]
            for k, end in enumerate(steps.ends.tolist()):
                y, x = (away[:, i] + end[i] for i in (0, 1))
                apart = y.unsqueeze(2) ** 2 + x.unsqueeze(1) ** 2
                reached = reached + (state[:, k] * (apart == 0)).sum((1, 2))
                missed = missed + (state[:, k] * (apart > self.marker**2)).sum((1, 2))
        tiny = 1e-300
        return ((reached + tiny) / (missed + tiny)).log()

    def marks(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The two pixels where a disc fits best, [B, 2, 2]; and which pixels neither disc covers, [B, size, size]."""
        wide = math.ceil(self.marker)
        disc = cover(points(wide).to(image.device).norm(dim=-1), self.marker).view(1, 1, 2 * wide + 1, -1)
        patches = F.unfold(F.pad(image.unsqueeze(1), (wide,) * 4), 2 * wide + 1)
        lacks = (disc.flatten().view(1, -1, 1) - patches).clamp_min(0).square().sum(1)
        best = lacks.argmin(1)
        place = torch.arange(self.size**2, device=image.device)
        place = torch.stack([place // self.size, place % self.size], -1)
        near = (place - place[best].unsqueeze(1)).square().sum(-1) <= self.marker**2
        second = lacks.masked_fill(near, math.inf).argmin(1)
        marks = torch.stack([place[best], place[second]], 1)
        apart = (place.view(1, 1, -1, 2) - marks.unsqueeze(2)).double().norm(dim=-1).amin(1)
        return marks, (apart > self.marker + 0.75).view_as(image)

    def _fit(self, seen: Tensor, weight: Tensor, drawn: Tensor) -> Tensor:
        """How likely the pixels below each dash are, at each place of its middle, [B, K, size, size] float64."""
        wide = math.isqrt(drawn.shape[1])
        visible = (drawn > VISIBLE).float().view(-1, 1, wide, wide)
        ink = drawn.view(-1, 1, wide, wide) * visible
        seen, weight = seen.unsqueeze(1), weight.unsqueeze(1)
        square = F.conv2d(weight * seen**2, visible) - 2 * F.conv2d(weight * seen, ink) + F.conv2d(weight, ink**2)
        return (-square.clamp_min(0).double() / (2 * NOISE**2)).exp()

    def _fit_first(self, seen: Tensor, weight: Tensor, drawn: Tensor, marks: Tensor, rim: int) -> Tensor:
        """The same of first dashes, which begin at the marks, [B, 2, 360] float64."""
        near = torch.arange(2 * rim + 1, device=seen.device)
        y, x = (marks[..., i, None] + near for i in (0, 1))
        row = torch.arange(len(seen), device=seen.device)[:, None, None, None]
        patch, valid = (each[row, y.unsqueeze(3), x.unsqueeze(2)].flatten(2).unsqueeze(2) for each in (seen, weight))
        square = ((patch - drawn).square() * valid * (drawn > VISIBLE)).sum(-1)
        return (-square.double() / (2 * NOISE**2)).exp()


def _shifted(grid: Tensor, by: Tensor) -> Tensor:
    """Moved by (y, x), zeros moving in. grid: [B, y, x]."""
    y, x = (int(each) for each in by)
    high, wide = grid.shape[1:]
    moved = torch.zeros_like(grid)
    moved[:, max(y, 0) : high + min(y, 0), max(x, 0) : wide + min(x, 0)] = grid[
        :, max(-y, 0) : high + min(-y, 0), max(-x, 0) : wide + min(-x, 0)
    ]
    return moved
