"""Pathfinder: what is drawn against the published generator, what is marked, and how far the tracer is right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from contextlab import build_task
from contextlab.errors import InputError
from contextlab.learners.dashes import Steps
from contextlab.tasks import pathfinder_curves
from contextlab.tasks.pathfinder import Pathfinder
from tests.tasks.published import Figure, hold

EASY = Pathfinder.presets["easy"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PUBLISHED: dict[str, Figure] = {
    "connected": (0.488, 0.5, 400),
    "distractors": (1.25, 0.982, 400),
    "from one mark to the other": (12.974, 5.17, 400),
    "from a curve's beginning to its end": (13.195, 5.125, 800),
    "from one beginning to the other": (7.064, 0.225, 400),
    "row of the first beginning": (15.015, 0.791, 400),
    "row of an end": (16.31, 8.737, 800),
    "column of an end": (16.849, 8.859, 800),
}
"""Of from_wrapper of snakes2.py with Long Range Arena's values for 32 x 32 (pathfinder.py of its data folder, commit
cd31e5c), in pixels.

From github.com/drewlinsley/pathfinder at commit 7b538865667dfe16f949ed3b7c8dc6a65ca87099, scipy's former imresize and
imsave put back, OpenCV 5.0 (4.14 draws the same).
"""


def test_images_are_those_of_the_published_generator() -> None:
    task = build_task("pathfinder")
    prompt = task.sample(320, generator())
    marks = prompt.hidden["marks"].double()
    curves, _ = task._canvas(generator(1), "cpu").pairs(320, task.segments)
    first, last = (torch.stack([getattr(each, end) for each in curves], 1).double() for end in ("first", "last"))
    found = {
        "connected": prompt.targets[prompt.scored] == task.levels + 1,
        "distractors": prompt.hidden["drawn"],
        "from one mark to the other": (marks[:, 0] - marks[:, 1]).norm(dim=-1),
        "from a curve's beginning to its end": (first - last).norm(dim=-1),
        "from one beginning to the other": (first[:, 0] - first[:, 1]).norm(dim=-1),
        "row of the first beginning": first[:, 0, 0],
        "row of an end": last[..., 0],
        "column of an end": last[..., 1],
    }
    assert list(found) == list(PUBLISHED)
    for name, own in found.items():
        hold(name, own, PUBLISHED[name], spread=0.2)


def test_an_image_has_a_disc_at_each_mark_and_is_dark_elsewhere() -> None:
    task = build_task("pathfinder", **EASY)
    prompt = task.sample(64, generator())
    image = prompt.inputs.view(64, task.size, task.size)
    for mark in prompt.hidden["marks"].unbind(1):
        rows = torch.arange(64)
        assert (image[rows, mark[:, 0], mark[:, 1]] == task.levels - 1).all()
    assert (image == 0).float().mean() > 0.6
    assert torch.equal(prompt.scored.nonzero()[:, 1], torch.full((64,), task.size**2 - 1))


def test_marks_are_of_one_curve_where_connected() -> None:
    """Half of them are; curves of equal draws are the same ones."""
    task = build_task("pathfinder", **{**EASY, "distractors": 0})
    canvas = task._canvas(generator(2), "cpu")
    curves, mask = canvas.pairs(200, task.segments)
    prompt = task.sample(200, generator(2))  # draws the same curves first
    ends = [(each.first, each.last) for each in curves]
    first, last = prompt.hidden["marks"].unbind(1)
    same = torch.zeros(200, dtype=torch.bool)
    for begin, end in ends:
        same |= (first == begin).all(1) & (last == end).all(1)
    assert torch.equal(same, prompt.targets[:, -1] == task.levels + 1)
    assert 70 < same.sum() < 130
    assert (mask.amax(1) == 100).all()


def test_dashes_of_a_curve_follow_one_another() -> None:
    """A dash has its length, and the next begins at twice the gap from its end, turned by less than 90 degrees."""
    canvas = build_task("pathfinder")._canvas(generator(3), "cpu")
    (curve, _), _ = canvas.pairs(100, 6)
    steps = Steps.of(2, 1)
    place = torch.stack([curve.at // canvas.side, curve.at % canvas.side], -1).double() - canvas.rim
    angle = torch.cat([steps.first_angles, steps.angles])[curve.shape]
    way = torch.stack([angle.sin(), angle.cos()], -1)
    begin, end = place - 2 * way, place  # later dashes are known by their ends
    end[:, 0], begin[:, 0] = place[:, 0] + 2 * way[:, 0], place[:, 0]
    gap = (begin[:, 1:] - end[:, :-1]).norm(dim=-1)
    assert 1 < gap.mean() < 2.5
    assert gap.max() < 2 + 2 * math.sqrt(2)  # places are whole pixels
    turn = (angle[:, 1:] - angle[:, :-1]).remainder(2 * math.pi)
    turn = torch.minimum(turn, 2 * math.pi - turn)
    assert turn.max() <= math.pi / 2
    assert torch.equal(place[:, -1].long(), curve.last)


def test_larger_continuity_makes_straighter_curves() -> None:
    spans = []
    for continuity in (1.0, 2.0, 4.0):
        canvas = build_task("pathfinder", continuity=continuity)._canvas(generator(4), "cpu")
        (curve, _), _ = canvas.pairs(200, 4)
        spans.append((curve.first - curve.last).double().norm(dim=-1).mean().item())
    assert spans[0] + 0.5 < spans[1] < spans[2] + 0.5


def test_first_dashes_point_where_they_are_told_to() -> None:
    canvas = build_task("pathfinder", begin=(10, 20))._canvas(generator(5), "cpu")
    (one, two), mask = canvas.pairs(100, 3)
    assert one.shape[:, 0].sub(180).min() >= 10
    assert one.shape[:, 0].sub(180).max() <= 20
    assert two.shape[:, 0].sub(180).min() < -90
    others, there = canvas.distractors(mask, 3, 2)
    for i, other in enumerate(others):
        begun = other.shape[there[:, i], 0] - 180
        assert ((begun >= 10) & (begun <= 20)).all()


@pytest.mark.parametrize(("options", "accuracy"), [(EASY, 0.88), ({}, 0.88)])
def test_the_tracer_finds_most_answers(options: dict[str, Any], accuracy: float) -> None:
    task = build_task("pathfinder", **options)
    prompt = task.sample(160 if task.size < 32 else 64, generator(6))
    errors = task.errors(task.learners()["tracer"](prompt), prompt)
    assert errors["accuracy"][prompt.scored].mean() > accuracy
    assert errors["cross_entropy"][prompt.scored].mean() < 0.35


def test_the_tracer_reads_images_of_its_size_only() -> None:
    task = build_task("pathfinder", **EASY)
    with pytest.raises(InputError, match=r"curve_tracer reads images of 324 pixels, this one has 400"):
        task.learners()["tracer"](build_task("pathfinder", **{**EASY, "size": 20}).sample(1, generator()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": 8}, r"distance 8 is too large for 32 x 32 pixels, .*: choose at most 7"),
        ({"begin": (10, -10)}, r"begin \[10, -10\]: expected the smaller first, \[-10, 10\]"),
        ({"dash": 9}, r"dash 9 is above a quarter of size 32; choose less"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task("pathfinder", **options)


def test_curves_that_do_not_fit_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder_curves, "HOPELESS", 1000)
    task = build_task("pathfinder", size=12, distance=2, segments=60)
    with pytest.raises(InputError, match=r"almost no two curves of 60 dashes fit in 12 x 12 pixels: choose fewer"):
        task.sample(1, generator())


def test_no_two_curves_touch() -> None:
    """Their dashes, drawn without margins, share no pixel that either covers by half."""
    canvas = build_task("pathfinder", **EASY)._canvas(generator(8), "cpu")
    curves, mask = canvas.pairs(150, 4)
    others, there = canvas.distractors(mask, 2, 2)
    marks = torch.zeros(150, 1, 2, dtype=torch.int64)
    parts = [(each, 1.0, None) for each in curves] + [(each, 1.0, there[:, i]) for i, each in enumerate(others)]
    drawn = [canvas.image([part], marks, 1.0)[:, 2:, 2:] >= 0.5 for part in parts]
    assert torch.stack(drawn).sum(0).max() == 1


def test_words_draw_the_image() -> None:
    task = build_task("pathfinder", **EASY)
    prompt = task.sample(1, generator(7))
    *lines, label = task.words(prompt).split("\n")
    assert [len(line) for line in lines] == [2 * task.size] * task.size
    assert label in ("[apart]", "[connected]")
    y, x = prompt.hidden["marks"][0, 0].tolist()
    assert lines[y][2 * x] == "@"
