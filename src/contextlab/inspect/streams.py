"""What a model's stream is after each layer, and what the model itself would answer from there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.inspect.capturing import capture
from contextlab.models import Model
from contextlab.models.answer import answer, readable
from contextlab.models.padding import padding
from contextlab.models.within import Within
from contextlab.prompt import Prompt

AFTER_EACH = ("embedded", "blocks.*.output")
BATCH = 256
"""Prompts that are read at once."""


def read_streams(model: Model, prompt: Prompt) -> tuple[dict[str, Tensor], Tensor]:
    """The stream where it begins and after each layer, by site, [B, T, D]; and the model's answers [B, T, k].

    Streams stand as the layers read them: of a model that reads prompts whole with what is not read on the left.
    """
    with capture(model, AFTER_EACH) as taken:
        answers = answer(model, prompt)
        return dict(taken), answers


def answers_from(model: Model, prompt: Prompt, stream: Tensor) -> Tensor:
    """What the model's own norm and read-out make of a stream [B, T, D] of `read_streams`: [B, T, k]."""
    return answer(model, prompt, Within(stream=stream, begin=len(model.blocks) * model.spec.loops))


def counting(model: Model, prompt: Prompt) -> Tensor:
    """Which tokens of a stream the answers that count are read from, [B, T] bool, as the streams stand."""
    mask, pool = readable(model, prompt), model.spec.pool
    if pool is None:
        return padding(mask, prompt.inputs, False, None).moved(prompt.scored)
    whole = torch.ones_like(prompt.scored) if mask is None else padding(mask, prompt.inputs, False, None).mask
    assert whole is not None
    last = torch.zeros_like(whole)
    last[:, -1] = True
    return last if pool == "last" else whole


def batches(prompt: Prompt) -> Iterator[Prompt]:
    """The prompts, a batch that is read at once after the other."""
    for first in range(0, prompt.batch, BATCH):
        yield prompt.rows(first, first + BATCH)


class TunedLens:
    """An affine map of the stream after each layer onto the last one: what later layers would make of it (2303.08112).

    Least squares over the tokens whose answers count; the paper descends on the divergence of the answers. `map` has a
    matrix [D + 1, D] by site, float64; its last row is the offset.
    """

    RIDGE = 1e-6
    """As a part of the mean square of the stream."""

    def __init__(self, model: Model, prompt: Prompt) -> None:
        """prompt: what it is fitted on."""
        squares: dict[str, Tensor] = {}
        products: dict[str, Tensor] = {}
        for part in batches(prompt):
            found, _ = read_streams(model, part)
            at = counting(model, part)
            streams = {site: F.pad(value[at].double(), (0, 1), value=1.0) for site, value in found.items()}
            wanted = list(streams.values())[-1][:, :-1]
            for site, x in streams.items():
                squares[site] = squares.get(site, 0) + x.mT @ x
                products[site] = products.get(site, 0) + x.mT @ wanted
        self.map: dict[str, Tensor] = {}
        for site, square in squares.items():
            size = self.RIDGE * square.diagonal().mean() * torch.eye(len(square)).to(square)
            self.map[site] = torch.linalg.solve(square + size, products[site])

    def __call__(self, site: str, stream: Tensor) -> Tensor:
        """What the last stream would be, of one after a layer, [B, T, D]."""
        matrix: Any = self.map[site]
        return (stream.double() @ matrix[:-1] + matrix[-1]).to(stream.dtype)
