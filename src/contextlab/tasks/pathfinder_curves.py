"""Draws Pathfinder's images: two dashed curves that do not touch, short ones beside them, and two marked tips."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.dashes import Steps, cover, points

TRIES = 3
"""Draws of a dash's direction until one fits; then the curve is given up."""
SNAKE_TRIES = 5
"""Draws of a distractor until one fits; then the image has one less."""
TAKEN, TOUCHES = 30, 80
"""Percent of a pixel that may be covered where a curve begins; by how much over 100 two dashes may share a pixel."""
CANDIDATES = 4096
HOPELESS = 50_000
"""Pairs of curves drawn, none of which fits, after which that is given up."""


@dataclass(frozen=True)
class Style:
    """What images are drawn with; see the options of `Pathfinder`."""

    size: int
    dash: int
    gap: int
    thickness: float
    continuity: float
    distance: int
    begin: tuple[int, int]


@dataclass
class Curves:
    """Curves of `dashes` dashes each. shape: [B, dashes], which stamp; at: [B, dashes], where its middle is, as a
    number of `Canvas`'s pixels; first, last: [B, 2] the tips (y, x)."""

    shape: Tensor
    at: Tensor
    first: Tensor
    last: Tensor

    def take(self, index: Tensor) -> Curves:
        """Those of the rows `index`, [N]."""
        return Curves(self.shape[index], self.at[index], self.first[index], self.last[index])


class Canvas:
    """The stamps of one style on a device, and how curves are drawn with them.

    Masks hold percent of each pixel that dashes and their margins cover, [B, side * side] uint8, with a rim beyond the
    image, which stamps may reach.
    """

    def __init__(self, style: Style, generator: torch.Generator, device: torch.device | str) -> None:
        self.style, self.generator, self.device = style, generator, device
        self.steps = steps = Steps.of(style.dash, style.gap).to(device)
        self.rim = steps.radius(style.thickness)
        self.side = style.size + 2 * self.rim
        kinds: dict[str, Any] = {"thickness": style.thickness}
        first, later = steps.first_angles, steps.angles
        self.ink = torch.cat([steps.drawn(first, **kinds), steps.drawn(later, **kinds, backwards=True)])
        kinds["wider"] = style.gap
        margin = torch.cat([steps.drawn(first, **kinds), steps.drawn(later, **kinds, backwards=True)])
        self.margin = (100 * margin).round().to(torch.uint8)
        near = torch.arange(-self.rim, self.rim + 1, device=device)
        self.window = (near.unsqueeze(1) * self.side + near).flatten()
        disc = torch.arange(-style.gap, style.gap + 1, device=device)
        inside = disc.unsqueeze(1) ** 2 + disc**2 <= style.gap**2
        self.beside = (disc.unsqueeze(1) * self.side + disc)[inside]

    def number(self, place: Tensor) -> Tensor:
        """Of the pixels at [..., 2] (y, x): [...]."""
        return (place[..., 0] + self.rim) * self.side + place[..., 1] + self.rim

    def inside(self, place: Tensor) -> Tensor:
        """Which places [..., 2] (y, x) lie in the image, [...]."""
        return ((place >= 0) & (place < self.style.size)).all(-1)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from 0 to 1, of the shape, such as [B, 2]."""
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def direction(self, count: int) -> Tensor:
        """Of first dashes, [count]: one of 360."""
        return (self.uniform(count) * 360).long()

    def blank(self, count: int) -> Tensor:
        """Masks [count, pixels] where the image's outermost pixels are covered."""
        mask = torch.zeros(self.side, self.side, dtype=torch.uint8, device=self.device)
        whole, within = slice(self.rim, -self.rim), slice(self.rim + 1, -self.rim - 1)
        mask[whole, whole], mask[within, within] = 100, 0
        return mask.flatten().expand(count, -1).clone()

    def pairs(self, count: int, dashes: int) -> tuple[list[Curves], Tensor]:
        """Two curves for each of `count` images that fit beside each other, and the masks of both, [count, pixels]."""
        found: list[tuple[list[Curves], Tensor]] = []
        done, drawn, number = 0, 0, min(CANDIDATES, 32 + 4 * count)
        while done < count:
            curves, mask = self._try_pairs(number, dashes)
            drawn += number
            found.append((curves, mask))
            done += len(mask)
            if drawn >= HOPELESS and not done:
                raise InputError(
                    f"almost no two curves of {dashes} dashes fit in {self.style.size} x {self.style.size} pixels: "
                    "choose fewer segments or a larger size"
                )
            share = (done + 1) / drawn
            number = max(32, min(CANDIDATES, int(1.2 * (count - done) / share)))
        two = [_joined([curves[i] for curves, _ in found], count) for i in range(2)]
        return two, torch.cat([mask for _, mask in found])[:count]

    def _try_pairs(self, count: int, dashes: int) -> tuple[list[Curves], Tensor]:
        low, high = 2 * self.style.distance, self.style.size - 2 * self.style.distance - 1
        tip = low + (self.uniform(count, 2) * (high - low)).long()
        turn = (self.uniform(count) * 360).floor() * (math.pi / 180)
        away = torch.stack([turn.sin(), turn.cos()], -1) * self.style.distance
        begin, end = self.style.begin
        first = 180 + begin + (self.uniform(count) * (end + 1 - begin)).long()
        walks = [Walk(self, tip, first), Walk(self, tip + away.round().long(), self.direction(count))]
        mask = self.blank(count)
        alive = walks[0].begun & walks[1].begun & walks[1].fits(walks[0].covered(mask))
        for _ in range(dashes - 1):
            for walk, other in (walks, walks[::-1]):
                keep = alive.nonzero().squeeze(1)
                mask = mask[keep]
                for each in walks:
                    each.keep(keep)
                alive = walk.go_on(mask, other.covered(mask))
        keep = alive.nonzero().squeeze(1)
        mask = mask[keep]
        for each in walks:
            each.keep(keep)
            mask = each.covered(mask)
        return [each.curves() for each in walks], mask

    def distractors(self, mask: Tensor, number: int, dashes: int) -> tuple[list[Curves], Tensor]:
        """Up to `number` curves for each image that fit beside what is there: for each its curves, and [B, number],
        whether it is there. Covers them in the mask."""
        count = len(mask)
        found, there = [], torch.zeros(count, number, dtype=torch.bool, device=self.device)
        for i in range(number):
            shape = torch.zeros(count, dashes, dtype=torch.int64, device=self.device)
            at = torch.full_like(shape, self.side // 2 * (self.side + 1))
            rows = torch.arange(count, device=self.device)
            for _ in range(SNAKE_TRIES):
                now, curves, grown = self._try_distractors(mask, rows, dashes)
                shape[now], at[now], there[now, i] = curves.shape, curves.at, True
                mask[now] = grown
                rows = rows[~there[rows, i]]
                if not len(rows):
                    break
            found.append(Curves(shape, at, shape.new_zeros(count, 2), shape.new_zeros(count, 2)))
        return found, there

    def _try_distractors(self, mask: Tensor, rows: Tensor, dashes: int) -> tuple[Tensor, Curves, Tensor]:
        own, first = mask[rows], self.direction(len(rows))
        begin, end = self.style.begin
        tip, room = self._free(own, first)
        walk = Walk(self, tip, first)
        alive = walk.begun & room & (first >= 180 + begin) & (first <= 180 + end)
        for _ in range(dashes - 1):
            keep = alive.nonzero().squeeze(1)
            own, rows = own[keep], rows[keep]
            walk.keep(keep)
            alive = walk.go_on(own, own)
        keep = alive.nonzero().squeeze(1)
        walk.keep(keep)
        return rows[keep], walk.curves(), walk.covered(own[keep])

    def _free(self, mask: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """A place for a first dash where none of its pixels is taken, all equally likely: [B, 2]; whether there is one.

        The number of taken pixels below the dash is a correlation, taken by Fourier transforms.
        """
        taken = (mask.view(-1, self.side, self.side) > TAKEN).float()
        foot = torch.zeros(self.side * self.side, device=self.device).expand(len(first), -1).clone()
        middle = self.side // 2 * (self.side + 1)
        foot[:, middle + self.window] = (self.margin[first] == 100).float()
        spectrum = torch.fft.rfft2(taken) * torch.fft.rfft2(foot.view_as(taken)).conj()
        below = torch.fft.irfft2(spectrum, s=(self.side, self.side)).roll((self.side // 2,) * 2, (1, 2))
        image = slice(self.rim, -self.rim)
        open_ = (below[:, image, image] < 0.5).flatten(1)
        pick = (self.uniform(*open_.shape) * open_).argmax(1)
        size = self.style.size
        return torch.stack([pick // size, pick % size], -1), open_.any(1)

    def image(self, parts: list[tuple[Curves, float, Tensor | None]], marks: Tensor, marker: float) -> Tensor:
        """Draw curves, each with its brightness and whether it is there, and discs at the marks [B, m, 2].

        Returns [B, size, size] float32, at most 1, which discs are; where things overlap the brightest counts.
        """
        count = len(marks)
        image = torch.zeros(count, self.side * self.side, device=self.device)
        for curves, brightness, there in parts:
            for shape, at in zip(curves.shape.T, curves.at.T, strict=True):
                ink = (self.ink[shape] * brightness).clamp_max(1)
                if there is not None:
                    ink = ink * there.unsqueeze(1)
                _brighten(image, at, self.window, ink)
        disc, window = self.disc(marker)
        for place in marks.unbind(1):
            _brighten(image, self.number(place), window, disc.expand(count, -1))
        whole = slice(self.rim, -self.rim)
        return image.view(count, self.side, self.side)[:, whole, whole]

    def disc(self, radius: float) -> tuple[Tensor, Tensor]:
        """A disc's pixels: how much of each it covers, and their numbers from its middle, both [pixels].

        It is cut where the rim ends.
        """
        wide = min(math.ceil(radius), self.rim)
        near = torch.arange(-wide, wide + 1, device=self.device)
        covered = cover(points(wide).to(self.device).norm(dim=-1), radius)
        return covered, (near.unsqueeze(1) * self.side + near).flatten()


class Walk:
    """Curves that grow by a dash at a time, one in each row."""

    def __init__(self, canvas: Canvas, tip: Tensor, first: Tensor) -> None:
        steps, self.canvas, self.tip = canvas.steps, canvas, tip
        end = tip + steps.first_ends[first]
        self.begun = canvas.inside(tip) & canvas.inside(end)
        self.shape, self.at = [first], [canvas.number(tip.clamp(0, canvas.style.size - 1))]
        self.angle, self.pivot, self.end = steps.first_angles[first], tip + steps.first_shifts[first], end

    def keep(self, index: Tensor) -> None:
        """Go on with the rows `index`, [N], alone."""
        self.shape, self.at = ([each[index] for each in known] for known in (self.shape, self.at))
        self.tip, self.angle, self.pivot, self.end = (
            each[index] for each in (self.tip, self.angle, self.pivot, self.end)
        )

    def curves(self) -> Curves:
        return Curves(torch.stack(self.shape, 1), torch.stack(self.at, 1), self.tip, self.end)

    def covered(self, mask: Tensor) -> Tensor:
        """The masks [B, pixels] with the newest dashes."""
        place = self.at[-1].unsqueeze(1) + self.canvas.window
        return mask.scatter(1, place, torch.maximum(mask.gather(1, place), self.canvas.margin[self.shape[-1]]))

    def fits(self, mask: Tensor) -> Tensor:
        """In which rows the newest dash touches nothing, [B]."""
        place = self.at[-1].unsqueeze(1) + self.canvas.window
        return (mask.gather(1, place).short() + self.canvas.margin[self.shape[-1]]).amax(1) < 100 + TOUCHES

    def go_on(self, mask: Tensor, beside: Tensor) -> Tensor:
        """Add a dash that touches nothing in `beside`, and cover the one before in `mask`, in place.

        Returns in which rows one fits, [B].
        """
        canvas, steps = self.canvas, self.canvas.steps
        ends = self.pivot.unsqueeze(1) + steps.ends
        inside = canvas.inside(ends)
        number = canvas.number(ends.clamp(0, canvas.style.size - 1))
        rows = torch.arange(len(mask), device=mask.device)
        crowded = beside[rows[:, None, None], number.unsqueeze(2) + canvas.beside].amax(2)
        weight = steps.turns(self.angle, canvas.style.continuity) * inside * (1 - crowded.double() / 100)
        total = weight.sum(1, keepdim=True)
        possible = total.squeeze(1) > 1e-4
        likely = torch.where(possible.unsqueeze(1), weight, torch.ones_like(weight)).cumsum(1)
        draws = canvas.uniform(len(mask), TRIES).double() * likely[:, -1:]
        pick = torch.searchsorted(likely, draws, right=True).clamp_max(likely.shape[1] - 1)
        chosen, left = pick[:, 0].clone(), possible.nonzero().squeeze(1)
        fits = torch.zeros_like(possible)
        for trial in range(TRIES):
            wanted = pick[left, trial]
            place = number[left, wanted].unsqueeze(1) + canvas.window
            sums = beside[left.unsqueeze(1), place].short() + canvas.margin[360 + wanted]
            good = sums.amax(1) < 100 + TOUCHES if len(left) else sums.new_zeros(0, dtype=torch.bool)
            chosen[left[good]], fits[left[good]] = wanted[good], True
            left = left[~good]
        mask.copy_(self.covered(mask))
        self.shape.append(360 + chosen)
        self.at.append(number[rows, chosen])
        self.end, self.angle = ends[rows, chosen], steps.angles[chosen]
        self.pivot = self.pivot + steps.shifts[chosen]
        return fits


def _brighten(image: Tensor, at: Tensor, window: Tensor, ink: Tensor) -> None:
    place = at.unsqueeze(1) + window
    image.scatter_(1, place, torch.maximum(image.gather(1, place), ink))


def _joined(parts: list[Curves], count: int) -> Curves:
    return Curves(
        *(torch.cat([getattr(each, name) for each in parts])[:count] for name in ("shape", "at", "first", "last"))
    )
