"""What RULER's generators draw, as figures of the public code, and ours held to them."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from contextlab import build_task
from contextlab.tasks.text.ruler_aggregation import zeta_counts
from tests.tasks.published import Figure, hold

PUBLISHED: dict[str, Figure] = {
    "depth of the answer, niah_single_1": (0.50011, 0.2864, 400),
    "place among the needles, niah_multikey_1": (0.48, 0.3785, 400),
    "place among the needles, niah_multikey_2": (0.48181, 0.2874, 400),
    "place among the needles, niah_multikey_3": (0.46119, 0.2776, 400),
    "depth of the first assignment": (0.13631, 0.1226, 400),
    "depth of the last assignment": (0.84534, 0.1137, 400),
}
"""Depths and places are between 0 and 1. With 40 lines of noise, or 40 needles for other keys.

From generate_input_output of scripts/data/synthetic/niah.py and variable_tracking.py, run with the lists of wonderwords
3.0.1 on noise and on needles (the essays are not at hand), of github.com/NVIDIA/RULER at commit
c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a.
"""

COUNTS = [243, 60, 27, 15, 9, 6, 4, 3, 3]
"""How often freq_words_extraction.py of that commit has the dots and each of eight words when asked for 400 words."""

NEEDLE = r"One of the special magic \w+ for (\S+) is: (\S+)\.\n"


def texts(name: str, length: int, count: int = 300, **options) -> list[tuple[str, list[str]]]:
    task = build_task("ruler", task=name, length=length, **options)
    prompt = task.sample(count, torch.Generator().manual_seed(len(name)))
    asked = [task.codec.decode(task.ask(prompt, row).tolist()) for row in range(count)]
    return [(text, task.references(prompt, row)) for row, text in enumerate(asked)]


def test_the_needle_is_as_deep_in_noise_as_published() -> None:
    depths = []
    for text, (value,) in texts("niah_single_1", 4000):
        body = re.split(r"afterwards\.\n|\nWhat is", text)[1]
        depths.append(body.index(value) / len(body))
    hold("depth", torch.tensor(depths), PUBLISHED["depth of the answer, niah_single_1"])


@pytest.mark.parametrize(
    ("name", "length"), [("niah_multikey_1", 1500), ("niah_multikey_2", 2600), ("niah_multikey_3", 4600)]
)
def test_the_needle_that_is_asked_for_stands_anywhere_among_the_others(name: str, length: int) -> None:
    places = []
    for text, (value,) in texts(name, length):
        values = [each for _, each in re.findall(NEEDLE, text)]
        places.append(values.index(value) / (len(values) - 1))
    hold("place", torch.tensor(places), PUBLISHED[f"place among the needles, {name}"])


def test_assignments_are_as_deep_in_noise_as_published_and_never_neighbours() -> None:
    first, last = [], []
    for text, _ in texts("vt", 4000, example=False):
        lines = text.split("text below.\n")[1].split("\nQuestion")[0].split("\n")[:-1]  # the last is cut
        at = [i for i, line in enumerate(lines) if line.startswith("VAR")]
        assert len(at) == 5
        assert len(lines) == 45
        assert min(b - a for a, b in itertools.pairwise(at)) > 1
        first.append(at[0] / (len(lines) - 1))
        last.append(at[-1] / (len(lines) - 1))
    hold("first", torch.tensor(first), PUBLISHED["depth of the first assignment"])
    hold("last", torch.tensor(last), PUBLISHED["depth of the last assignment"])


def test_short_chains_may_have_no_noise_between_them() -> None:
    for text, references in texts("vt", 500, 5, example=False):
        assert text.count("VAR") == 9
        assert len(references) == 5


def test_frequent_words_are_as_many_as_published() -> None:
    assert zeta_counts(400, 9).tolist() == COUNTS
