"""Labelled images from files that the user has, or drawn on the spot; nothing is downloaded, and no pickle is read."""

from __future__ import annotations

import gzip
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from contextlab.errors import InputError

Part = Literal["train", "test"]
Pair = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
DIGITS = "digits"
"""The images that every machine has: digits drawn on the spot."""
ARRAYS: Mapping[Part, tuple[tuple[str, str], ...]] = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}
"""Names of the arrays of images and of labels in an .npz file."""
IDX: Mapping[Part, str] = {"train": "train", "test": "t10k"}
"""How the names of MNIST's files begin."""
CIFAR: Mapping[Part, str] = {"train": "data_batch_*.bin", "test": "test_batch.bin"}
GREY = (299, 587, 114)
"""Thousandths of red, green and blue in a grey level (ITU-R BT.601)."""
FORMS = (
    "a file .npz with x_train, y_train, x_test and y_test, or a folder with MNIST's idx files or with CIFAR-10's .bin "
    "files"
)


@dataclass(frozen=True)
class Images:
    """images: [N, height, width] uint8 grey levels. labels: [N] int64. classes: of both parts together."""

    images: Tensor
    labels: Tensor
    classes: int

    def to(self, device: torch.device | str) -> Images:
        """The same on a device."""
        return Images(self.images.to(device), self.labels.to(device), self.classes)


@lru_cache(maxsize=8)
def load_images(source: str, part: Part, device: str = "cpu") -> Images:
    """One part of the images of a source, kept, so that files are read once.

    source: "digits", or the path of a file or folder. Raises InputError where it cannot be read.
    """
    return _both(source)[part].to(device)


@lru_cache(maxsize=4)
def _both(source: str) -> dict[Part, Images]:
    pairs = _drawn() if source == DIGITS else _read(source)
    found: dict[Part, tuple[Tensor, Tensor]] = {}
    for part, (images, labels) in pairs.items():
        found[part] = _grey(source, part, images), _labels(source, part, labels, len(images))
    shapes = {part: tuple(images.shape[1:]) for part, (images, _) in found.items()}
    if shapes["train"] != shapes["test"]:
        raise InputError(f"images {source!r}: training images are {shapes['train']}, test images {shapes['test']}")
    classes = 1 + max(int(labels.max()) for _, labels in found.values())
    if classes < 2:
        raise InputError(f"images {source!r}: all labels are 0; expected two classes or more")
    return {part: Images(images, labels, classes) for part, (images, labels) in found.items()}


def _read(source: str) -> dict[Part, Pair]:
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"images {source!r}: no such file or folder; expected {DIGITS!r}, {FORMS}")
    try:
        if path.is_dir():
            if any(path.glob("*-idx?-ubyte*")):
                return {part: (_idx(path, part, "images", 3), _idx(path, part, "labels", 1)) for part in IDX}
            if any(path.glob("*_batch*.bin")):
                return {part: _cifar(path, part) for part in CIFAR}
        elif path.suffix == ".npz":
            return _npz(path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"images {source!r} cannot be read ({what})") from None
    raise InputError(f"images {source!r}: expected {FORMS}")


def _npz(path: Path) -> dict[Part, Pair]:
    with np.load(path, allow_pickle=False) as file:
        found: dict[Part, Pair] = {}
        for part, names in ARRAYS.items():
            known = [pair for pair in names if set(pair) <= set(file.files)]
            if not known:
                raise InputError(
                    f"images {str(path)!r}: no arrays {names[0][0]} and {names[0][1]}; it has {', '.join(file.files)}"
                )
            found[part] = file[known[0][0]], file[known[0][1]]
    return found


def _idx(folder: Path, part: Part, what: str, dimensions: int) -> np.ndarray[Any, Any]:
    """An array of bytes in MNIST's format: 0, 0, 8 for bytes, the number of sizes, each in four bytes; the bytes."""
    name = f"{IDX[part]}-{what}-idx{dimensions}-ubyte"
    path = next((each for each in (folder / name, folder / f"{name}.gz") if each.exists()), None)
    if path is None:
        raise InputError(f"images {str(folder)!r}: {name} (or {name}.gz) is not there")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    begin = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < begin:
        raise InputError(f"images {str(path)!r}: not an idx file of bytes with {dimensions} dimensions")
    sizes = np.frombuffer(data[4:begin], dtype=">i4").tolist()
    if len(data) - begin != math.prod(sizes):
        raise InputError(f"images {str(path)!r}: says {sizes}, and holds {len(data) - begin} bytes")
    return np.frombuffer(data, dtype=np.uint8, offset=begin).reshape(sizes)


def _cifar(folder: Path, part: Part) -> Pair:
    """CIFAR-10's binary files: a byte for the label, then 32 x 32 bytes each of red, green and blue."""
    files = sorted(folder.glob(CIFAR[part]))
    if not files:
        raise InputError(f"images {str(folder)!r}: {CIFAR[part]} is not there")
    data = np.concatenate([np.fromfile(each, dtype=np.uint8) for each in files])
    if len(data) % 3073:
        raise InputError(f"images {str(folder)!r}: {CIFAR[part]} is no whole number of records of 3073 bytes")
    rows = data.reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]


def _grey(source: str, part: Part, images: np.ndarray[Any, Any]) -> Tensor:
    if images.dtype.kind not in "iu" or (images.size and not 0 <= images.min() <= images.max() <= 255):
        raise InputError(
            f"images {source!r}: the {part} images are {images.dtype}; expected whole numbers from 0 to 255 (uint8)"
        )
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    elif images.ndim == 4 and images.shape[3] == 3 and len(images):
        weights = np.array(GREY, dtype=np.int64)
        parts = (images[i : i + 1000] @ weights for i in range(0, len(images), 1000))  # eight times as large
        images = np.concatenate([((part + 500) // 1000).astype(np.uint8) for part in parts])
    if images.ndim != 3 or not images.size:
        raise InputError(
            f"images {source!r}: the {part} images have the shape {list(images.shape)}; expected [images, height, "
            "width], or a last size of 3 for colours"
        )
    return torch.from_numpy(images.astype(np.uint8))


def _labels(source: str, part: Part, labels: np.ndarray[Any, Any], number: int) -> Tensor:
    flat = labels.reshape(-1)
    if labels.dtype.kind not in "iu" or len(flat) != number or flat.min() < 0:
        raise InputError(
            f"images {source!r}: the {part} labels are {labels.dtype} of shape {list(labels.shape)}; expected a whole "
            f"number from 0 for each of {number} images"
        )
    return torch.from_numpy(flat.astype(np.int64))


GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100",
)  # fmt: skip
"""The digits on 7 x 5 pixels."""
NUMBER: Mapping[Part, int] = {"train": 2000, "test": 500}
SIDE = 10
NOISE = 40.0


def _drawn() -> dict[Part, Pair]:
    """Digits at any place of 10 x 10 pixels, of any brightness from half on, under noise; always the same ones."""
    glyphs = torch.tensor([[[int(bit) for bit in row] for row in glyph.split()] for glyph in GLYPHS])
    generator = torch.Generator().manual_seed(0)
    found: dict[Part, Pair] = {}
    for part, number in NUMBER.items():
        label = torch.randint(len(GLYPHS), (number,), generator=generator)
        y = torch.randint(SIDE - 6, (number,), generator=generator)
        x = torch.randint(SIDE - 4, (number,), generator=generator)
        bright = torch.randint(128, 256, (number, 1, 1), generator=generator)
        image = torch.zeros(number, SIDE, SIDE)
        row = torch.arange(number)[:, None, None]
        down, across = torch.arange(7)[None, :, None], torch.arange(5)[None, None, :]
        image[row, y[:, None, None] + down, x[:, None, None] + across] = (glyphs[label] * bright).float()
        image += NOISE * torch.randn(image.shape, generator=generator)
        found[part] = image.round().clamp(0, 255).to(torch.uint8).numpy(), label.numpy()
    return found
