"""Images from files, pixel by pixel: each form of file against the arrays it was made from, and what is refused."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from contextlab import build_task
from contextlab.errors import InputError
from contextlab.learners.neighbours import PixelNeighbours
from contextlab.prompt import Prompt
from contextlab.tasks.image_files import load_images


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arrays(seed: int = 0, shape: tuple[int, ...] = (4, 3)) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(seed)
    return {
        "x_train": drawn.integers(0, 256, (12, *shape), dtype=np.uint8),
        "y_train": np.arange(12, dtype=np.uint8) % 3,
        "x_test": drawn.integers(0, 256, (6, *shape), dtype=np.uint8),
        "y_test": np.arange(6, dtype=np.uint8) % 3,
    }


def write_idx(folder: Path, made: dict[str, np.ndarray], zipped: bool) -> None:
    for part, ours in (("train", "train"), ("t10k", "test")):
        for what, letter in (("images", "x"), ("labels", "y")):
            array = made[f"{letter}_{ours}"]
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            data = head + array.tobytes()
            name = f"{part}-{what}-idx{array.ndim}-ubyte"
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(data) if zipped else data)


@pytest.mark.parametrize("form", ["npz", "idx", "gz"])
def test_images_are_those_of_the_files(tmp_path: Path, form: str) -> None:
    made = arrays()
    if form == "npz":
        np.savez(tmp_path / "own.npz", **made)
        source = tmp_path / "own.npz"
    else:
        write_idx(tmp_path, made, form == "gz")
        source = tmp_path
    for part in ("train", "test"):
        task = build_task("pixel_classification", images=str(source), part=part)
        prompt = task.sample(40, generator())
        image = prompt.hidden["image"].numpy()
        assert np.array_equal(prompt.inputs.numpy(), made[f"x_{part}"][image].reshape(40, -1))
        assert np.array_equal(prompt.targets[:, -1].numpy(), 256 + made[f"y_{part}"][image].astype(int))
        assert torch.equal(prompt.scored.nonzero()[:, 1], torch.full((40,), 11))
    assert task.input_size == 259
    assert task.chance()["accuracy"] == pytest.approx(1 / 3)


def test_cifars_binary_files_are_read_as_grey(tmp_path: Path) -> None:
    made = arrays(1, (32, 32, 3))
    for name, part, rows in (("data_batch_1", "train", slice(0, 5)), ("data_batch_2", "train", slice(5, 12)),
                             ("test_batch", "test", slice(0, 6))):  # fmt: skip
        pixels = made[f"x_{part}"][rows].transpose(0, 3, 1, 2).reshape(-1, 3072)
        np.concatenate([made[f"y_{part}"][rows, None], pixels], 1).tofile(tmp_path / f"{name}.bin")
    found = load_images(str(tmp_path), "train")
    expected = (made["x_train"].astype(float) * [0.299, 0.587, 0.114]).sum(-1)
    assert np.abs(found.images.numpy() - expected).max() < 0.501
    assert found.labels.tolist() == made["y_train"].tolist()
    assert build_task("pixel_classification", images=str(tmp_path)).sample(1, generator()).length == 1024


def test_fewer_levels_and_another_order() -> None:
    plain = build_task("pixel_classification").sample(5, generator())
    few = build_task("pixel_classification", levels=4).sample(5, generator())
    assert torch.equal(few.inputs, plain.inputs // 64)
    task = build_task("pixel_classification", permuted=True)
    mixed = task.sample(5, generator())
    assert not torch.equal(mixed.inputs, plain.inputs)
    assert torch.equal(mixed.inputs.sort(1).values, plain.inputs.sort(1).values)
    order = task._order(100)
    assert torch.equal(order.sort().values, torch.arange(100))
    assert torch.equal(mixed.inputs, plain.inputs[:, order])
    assert task.words(mixed) == build_task("pixel_classification").words(plain)


def test_no_training_image_is_a_test_image_and_neighbours_know_most_digits() -> None:
    task = build_task("pixel_classification")
    train, test = (load_images("digits", part) for part in ("train", "test"))
    assert (train.images.shape, test.images.shape) == ((2000, 10, 10), (500, 10, 10))
    both = torch.cat([train.images, test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 2500
    for split in task.splits().values():
        prompt = split.sample(300, generator(1))
        errors = split.errors(split.learners()["neighbours"](prompt), prompt)
        assert errors["accuracy"][prompt.scored].mean() > 0.9
        assert errors["cross_entropy"][prompt.scored].mean() < 0.5


def test_the_nearest_image_that_is_another_has_the_vote() -> None:
    known = torch.tensor([[0, 0], [3, 3], [0, 2]])
    learner = PixelNeighbours(known, torch.tensor([0, 1, 2]), levels=4, classes=3, neighbours=1)
    inputs = torch.tensor([[0, 0], [3, 2]])
    prompt = Prompt(inputs, inputs, inputs > 9, inputs)
    assert learner(prompt)[:, -1].argmax(-1).tolist() == [4 + 2, 4 + 1]
    with pytest.raises(InputError, match="pixel_neighbours knows images of 2 pixels, this one has 3"):
        learner(Prompt(*[torch.zeros(1, 3, dtype=torch.int64)] * 4))


class Loud:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


def npz(folder: Path, **changed) -> Path:
    made = {name: array for name, array in {**arrays(), **changed}.items() if array is not None}
    np.savez(folder / "own.npz", **made)
    return folder / "own.npz"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_test": None}, r"no arrays x_test and y_test; it has x_train, y_train, y_test"),
        ({"x_train": np.zeros((12, 4, 3))}, r"train images are float64; expected whole numbers from 0 to 255"),
        ({"x_train": np.full((12, 4, 3), 256)}, r"train images are int64; expected whole numbers from 0 to 255"),
        ({"x_train": np.zeros((12, 4), np.uint8)}, r"shape \[12, 4\]; expected \[images, height, width\], or"),
        ({"x_test": np.zeros((6, 4, 4), np.uint8)}, r"training images are \(4, 3\), test images \(4, 4\)"),
        ({"y_test": np.arange(5)}, r"test labels are int64 of shape \[5\]; expected a whole number .* 6 images"),
        ({"y_train": np.arange(12) - 1}, r"train labels are int64 of shape \[12\]"),
        ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, r"all labels are 0; expected two classes or more"),
        ({"x_train": np.array([Loud()] * 12)}, r"cannot be read \(Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        build_task("pixel_classification", images=str(npz(tmp_path, **changed)))
    assert "\n" not in str(error.value)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    def refusal(source: Path) -> str:
        with pytest.raises(InputError) as error:
            build_task("pixel_classification", images=str(source))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such file or folder; expected 'digits', a file .npz" in refusal(tmp_path / "none.npz")
    assert "expected a file .npz with x_train" in refusal(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"PK\3\4 nothing")
    assert "cannot be read" in refusal(tmp_path / "a.npz")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(1))
    assert "expected a file .npz with x_train" in refusal(tmp_path / "a.pkl")
    write_idx(tmp_path, arrays(), zipped=False)
    images = tmp_path / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-1])
    assert "says [12, 4, 3], and holds 143 bytes" in refusal(tmp_path)
    images.write_bytes(b"\0\0\x0d\3" + whole[4:])
    assert "not an idx file of bytes with 3 dimensions" in refusal(tmp_path)
    images.unlink()
    assert "train-images-idx3-ubyte (or train-images-idx3-ubyte.gz) is not there" in refusal(tmp_path)
    cifar = tmp_path / "cifar"
    cifar.mkdir()
    (cifar / "data_batch_1.bin").write_bytes(b"\0" * 3074)
    assert "data_batch_*.bin is no whole number of records of 3073 bytes" in refusal(cifar)
