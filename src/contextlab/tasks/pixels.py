"""Images read a pixel at a time, from the user's files: sequential MNIST, sequential CIFAR and their like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from contextlab.learners.neighbours import PixelNeighbours
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.image_files import DIGITS, Images, Part, load_images

SHADES = " .:-=+*#%@"


def shaded(image: Tensor, levels: int) -> str:
    """Grey levels [height, width] as lines of text, two characters a pixel, the brighter the fuller."""
    scale = (len(SHADES) - 1) / (levels - 1)
    return "\n".join("".join(2 * SHADES[round(level * scale)] for level in line) for line in image.tolist())


@register(
    "task",
    "pixel_classification",
    family="images",
    papers=("1504.00941", "2011.04006"),
    cases=({"levels": 16}, {"part": "test", "permuted": True}),
)
@dataclass(frozen=True)
class PixelClassification(TokenTask):
    """Images read a pixel at a time: of which class is it? Sequential MNIST or CIFAR, from files that you have.

    The prompt is an image row by row, and its class is predicted at the last pixel. Images are drawn uniformly from
    those of the part, with replacement; colours are read as grey levels, as Long Range Arena does. What differs from
    published set-ups: pixels are tokens, where most models of sequential MNIST are given numbers.

    The default images are drawn on the spot: 2,500 noisy digits of 10 x 10 pixels, always the same ones. No pickle is
    read, so CIFAR-10 is that of the binary version (cifar-10-batches-bin).

    Token ids: grey levels 0 (black) to levels - 1, then one label for each class.

    images: "digits", or the path of a file .npz (x_train, y_train, x_test, y_test: images of bytes, [N, height, width]
        or [N, height, width, 3], and labels from 0, [N]), or of a folder with MNIST's idx files (also .gz) or
        CIFAR-10's .bin files.
    part: images to draw from, "train" or "test".
    levels: grey levels that the 256 of the files are made into.
    permuted: the pixels in one random order, the same for all images (permuted sequential MNIST).
    """

    one_prediction: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"easy": {"levels": 16}, "hard": {"permuted": True}}

    images: str = DIGITS
    part: Part = "train"
    levels: Annotated[int, Field(ge=2, le=256)] = 256
    permuted: bool = False

    def __post_init__(self) -> None:
        check_options(self)
        self._known("cpu")  # refuses what cannot be read

    def _known(self, device: torch.device | str) -> Images:
        return load_images(self.images, self.part, str(device))

    @property
    def classes(self) -> int:
        """How many there are."""
        return self._known("cpu").classes

    @property
    def input_size(self) -> int:
        return self.levels + self.classes

    def symbol(self, token: int) -> str:
        """A grey level, or =class."""
        return str(token) if token < self.levels else f"={token - self.levels}"

    def _order(self, pixels: int) -> Tensor:
        """The place in the image of each pixel of a prompt, [pixels]."""
        order = torch.arange(pixels)
        return torch.randperm(pixels, generator=torch.Generator().manual_seed(0)) if self.permuted else order

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The image, two characters a pixel, the brighter the fuller, and in brackets the class."""
        shape, inputs = self._known("cpu").images.shape[1:], prompt.inputs[row].cpu()
        image = torch.empty_like(inputs).scatter_(0, self._order(len(inputs)), inputs)
        return f"{shaded(image.view(*shape), self.levels)}\n[{int(prompt.targets[row, -1]) - self.levels}]"

    def _tokens(self, images: Tensor) -> Tensor:
        """Of images [N, height, width] uint8: [N, height * width] int64."""
        text = images.flatten(1).long() * self.levels // 256
        return text[:, self._order(text.shape[1]).to(text.device)] if self.permuted else text

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts: inputs [batch, height * width] int64; hidden "image" [batch], each image's number."""
        known = self._known(device)
        pick = torch.randint(len(known.labels), (batch,), generator=generator, device=device)
        text = self._tokens(known.images[pick])
        targets, scored = torch.zeros_like(text), torch.zeros_like(text, dtype=torch.bool)
        targets[:, -1], scored[:, -1] = self.levels + known.labels[pick], True
        return Prompt(text, targets, scored, torch.zeros_like(text), hidden={"image": pick})

    def learners(self) -> dict[str, Learner]:
        """`neighbours`, the nearest training images; an image is no neighbour of itself."""
        known = load_images(self.images, "train")
        return {"neighbours": PixelNeighbours(self._tokens(known.images), known.labels, self.levels, known.classes)}

    def splits(self) -> dict[str, Task]:
        """'train', then the images of the test part."""
        return {"train": self} if self.part == "test" else {"train": self, "images=test": self.replace(part="test")}

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among the classes."""
        return {"accuracy": 1 / self.classes, "cross_entropy": math.log(self.classes)}
