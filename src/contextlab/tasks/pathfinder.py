"""Pathfinder of Long Range Arena: are two marked tips the ends of one dashed curve? An image read pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.tracing import CurveTracer
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.pathfinder_curves import Canvas, Curves, Style
from contextlab.tasks.pixels import shaded

Degrees = Annotated[int, Field(ge=-180, le=179)]


@register(
    "task",
    "pathfinder",
    family="images",
    papers=("2011.04006", "1805.08315"),
    cases=(
        {"size": 18, "segments": 3, "distance": 4, "distractors": 1, "distractor_segments": 2, "levels": 16},
        {"size": 20, "segments": 4, "distance": 4, "contrast": 1.0},
    ),
)
@dataclass(frozen=True)
class Pathfinder(TokenTask):
    """Long Range Arena's Pathfinder: an image of dashed curves, pixel by pixel; do two marked tips belong to one curve?

    Two long curves begin near the middle and wind outwards without touching; a tip where one begins and a tip where
    one ends are marked by discs, of the same curve in half of the images. Shorter curves are there to distract. The
    image is read row by row as grey levels, and the answer is predicted at its last pixel.

    Curves are drawn as the published generator draws them (github.com/drewlinsley/pathfinder), by default with the
    values that Long Range Arena names for 32 x 32 pixels: a dash turns from the one before by an angle of weight cos^2,
    and is drawn again where it would touch what is there; two curves that do not fit are thrown away, and a distractor
    that does not fit in five tries is left out, so that images have 1.3 of 5 on average. What differs: dashes are drawn
    by the share of a pixel that they cover, where the published ones are lines drawn larger and made small again, a
    fifth brighter in all; and no two curves touch, which there the newest dashes of both may. `path_x` has the sizes of
    Path-X, with one `gap` where that draws 2 or 3.

    Token ids: grey levels 0 (black) to levels - 1, then the labels "apart" and "connected".

    size: pixels on each side of the image; a prompt has size * size tokens.
    segments: dashes of each of the two curves; the published levels of difficulty are 6, 9 and 14.
    distance: pixels between the tips where the two curves begin; at most (size - 2) / 4.
    distractors: shorter curves, at most.
    distractor_segments: dashes of each.
    dash: length of a dash in pixels.
    gap: half the pixels between two dashes of a curve, and the margin that others keep from them.
    continuity: how straight curves are; 1 allows turns of up to 90 degrees, 2 of up to 45.
    thickness: of a dash, in pixels.
    marker: radius of the discs, in pixels.
    contrast: brightness of the two curves where distractors have 1.
    begin: the first and the last direction, in degrees from -180 to 179 (0 is right, 90 is down), in which one curve
        and all distractors begin; a distractor that would begin in another is tried again. The published generator
        can at its size of 32 begin in no others than the default's (up and left), at 128 in all, (-180, 179).
    levels: grey levels.
    """

    one_prediction: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {
            "size": 18, "segments": 4, "distance": 4, "distractors": 2, "distractor_segments": 2, "continuity": 1.5,
            "begin": (-180, 179), "levels": 16,
        },
        "hard": {},
        "path_x": {
            "size": 128, "distance": 20, "distractors": 8, "dash": 5, "gap": 3, "continuity": 1.8, "thickness": 1.5,
            "marker": 3.0, "contrast": 1.0, "begin": (-180, 179),
        },
    }  # fmt: skip

    size: Annotated[int, Field(ge=10)] = 32
    segments: Annotated[int, Field(ge=2)] = 14
    distance: PositiveInt = 7
    distractors: Annotated[int, Field(ge=0)] = 5
    distractor_segments: PositiveInt = 4
    dash: PositiveInt = 2
    gap: PositiveInt = 1
    continuity: Annotated[float, Field(gt=0)] = 1.0
    thickness: Annotated[float, Field(ge=0.25)] = 0.5
    marker: Annotated[float, Field(ge=1)] = 1.5
    contrast: Annotated[float, Field(gt=0, le=1)] = 0.75
    begin: tuple[Degrees, Degrees] = (-150, -121)
    levels: Annotated[int, Field(ge=2, le=256)] = 256

    def __post_init__(self) -> None:
        check_options(self)
        if 4 * self.distance + 2 > self.size:
            raise InputError(
                f"distance {self.distance} is too large for {self.size} x {self.size} pixels, where curves begin near "
                f"the middle: choose at most {(self.size - 2) // 4}"
            )
        if self.begin[0] > self.begin[1]:
            raise InputError(f"begin {list(self.begin)}: expected the smaller first, {list(self.begin[::-1])}")
        for name in ("dash", "gap", "thickness", "marker"):
            if getattr(self, name) > self.size / 4:
                raise InputError(f"{name} {getattr(self, name)} is above a quarter of size {self.size}; choose less")

    @property
    def input_size(self) -> int:
        return self.levels + 2

    def symbol(self, token: int) -> str:
        """A grey level, or the label."""
        return str(token) if token < self.levels else ("apart", "connected")[token - self.levels]

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The image, two characters a pixel, the brighter the fuller, and in brackets the label."""
        image = prompt.inputs[row].view(self.size, self.size)
        return f"{shaded(image, self.levels)}\n[{self.symbol(int(prompt.targets[row, -1]))}]"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts: inputs [batch, size * size] int64.

        hidden: "marks" [batch, 2, 2], the marked pixels (y, x), where a curve begins first; "drawn" [batch], the number
        of distractors. Raises InputError where almost no two curves fit into the image.
        """
        canvas = self._canvas(generator, device)
        curves, mask = canvas.pairs(batch, self.segments)
        others, there = canvas.distractors(mask, self.distractors, self.distractor_segments)
        connected = canvas.uniform(batch) < 0.5
        origin = canvas.uniform(batch) < 0.5
        first = torch.where(origin.unsqueeze(1), curves[0].first, curves[1].first)
        last = torch.where((origin == connected).unsqueeze(1), curves[0].last, curves[1].last)
        marks = torch.stack([first, last], 1)
        full = 1 / min(1.0, self.thickness)
        parts: list[tuple[Curves, float, Tensor | None]] = [(each, full * self.contrast, None) for each in curves]
        parts += [(each, full, there[:, i]) for i, each in enumerate(others)]
        image = canvas.image(parts, marks, self.marker)
        text = (image * (self.levels - 1)).round().long().flatten(1)
        targets, scored = torch.zeros_like(text), torch.zeros_like(text, dtype=torch.bool)
        targets[:, -1], scored[:, -1] = self.levels + connected.long(), True
        hidden = {"marks": marks, "drawn": there.sum(1)}
        return Prompt(text, targets, scored, torch.zeros_like(text), hidden=hidden)

    def _canvas(self, generator: torch.Generator, device: torch.device | str) -> Canvas:
        style = Style(self.size, self.dash, self.gap, self.thickness, self.continuity, self.distance, self.begin)
        return Canvas(style, generator, device)

    def learners(self) -> dict[str, Learner]:
        """`tracer`, which follows dashes from one mark to the other."""
        return {
            "tracer": CurveTracer(
                self.size, self.segments, self.dash, self.gap, self.continuity, self.thickness, self.marker,
                self.contrast, self.levels,
            )
        }  # fmt: skip

    def splits(self) -> dict[str, Task]:
        """'train', shorter curves (two thirds of the dashes), and no distractors."""
        found: dict[str, Task] = {"train": self}
        shorter = max(2, 2 * self.segments // 3)
        if shorter < self.segments:
            found[f"segments={shorter}"] = self.replace(segments=shorter)
        if self.distractors:
            found["distractors=0"] = self.replace(distractors=0)
        return found

    def chance(self) -> Mapping[str, float]:
        """Guessing between the two labels."""
        return {"accuracy": 0.5, "cross_entropy": math.log(2)}
