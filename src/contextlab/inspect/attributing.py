"""Which tokens one answer rests on: by gradients, by integrated gradients, and by leaving each of them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from contextlab.errors import InputError, unknown
from contextlab.inspect.capturing import capture, patch
from contextlab.inspect.influences import AT_ONCE
from contextlab.inspect.taps import frozen
from contextlab.models import Model

Method = Literal["gradient", "integrated", "left_out"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Asked:
    """One answer of each text as a function of its tokens' vectors; made by `ask`.

    embedded: [B, T, D]. nothing: [D], the vector that says nothing, which stands for a token that is left out.
    score: (vectors [N, T, D], the texts that they stand in [N]) -> how much of the answer is there, [N].
    """

    embedded: Tensor
    nothing: Tensor
    score: Callable[[Tensor, Tensor], Tensor]

    def rows(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Texts [N] and numbers [N] of all pairs of a text and a number below `count`, as many as are read at once."""
        texts = torch.arange(len(self.embedded), device=self.embedded.device).repeat_interleave(count)
        numbers = torch.arange(count, device=self.embedded.device).repeat(len(self.embedded))
        step = max(1, AT_ONCE // self.embedded.shape[1])
        yield from zip(texts.split(step), numbers.split(step), strict=True)

    @torch.no_grad()
    def kept(self, masks: Tensor) -> Tensor:
        """What the answer scores where only these tokens are left, [B, K]. masks: [B, K, T] bool."""
        found = []
        for texts, numbers in self.rows(masks.shape[1]):
            left = masks[texts, numbers][..., None]
            found.append(self.score(torch.where(left, self.embedded[texts], self.nothing), texts))
        return torch.cat(found).view(masks.shape[:2])


@torch.no_grad()
def ask(model: nn.Module, inputs: Tensor, places: Tensor, nothing: Tensor | None = None) -> Asked:
    """What the model answers at one place of each text, to be attributed to the tokens.

    model: of ours. inputs: [B, T] or [B, T, d]. places: [B] int64. nothing: [D]; None: the mean of the tokens' vectors.

    How much of the answer is there is, of logits, that of the token which the model finds likeliest when it reads the
    whole text, less the mean of all; of vectors, what is predicted along what it predicts then.
    """
    if not isinstance(model, Model):
        raise InputError(f"attribution: expected a model of ours, got {type(model).__name__}")
    if model.spec.pool is not None:
        raise InputError("attribution: the model answers once for a whole text, not at a place")
    if places.shape != inputs.shape[:1] or not bool(((places >= 0) & (places < inputs.shape[1])).all()):
        raise InputError(f"places: expected one from 0 to {inputs.shape[1] - 1} for each of the {len(inputs)} texts")
    texts = torch.arange(len(inputs), device=inputs.device)
    with capture(model, "embedded") as taken:
        said = model(inputs)[texts, places]
    embedded = taken["embedded"]
    if model.spec.read_in == "token":
        along = nn.functional.one_hot(said.argmax(-1), said.shape[-1]).to(said) - 1 / said.shape[-1]
    else:
        along = said / said.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(said.dtype).tiny)

    def score(vectors: Tensor, of: Tensor) -> Tensor:
        with patch(model, {"embedded": lambda _: vectors}):
            answers: Tensor = model(inputs[of])
        return (answers[torch.arange(len(of), device=of.device), places[of]] * along[of]).sum(-1)

    return Asked(embedded, embedded.mean((0, 1)) if nothing is None else nothing, score)


def attributions(model: nn.Module, asked: Asked, method: Method, steps: int = 32) -> Tensor:
    """How much each token adds to the answer, [B, T], against the vector that says nothing.

    - gradient: the slope at the text, times what the token's vector differs by.
    - integrated: the mean slope on the straight way from nothing but that vector to the text, times the same
      (integrated gradients, 1703.01365), at `steps` points of Gauss and Legendre; they sum to what the text adds.
    - left_out: what the answer loses where this token alone says nothing.
    """
    if method not in METHODS:
        raise InputError(unknown("method", method, METHODS))
    if method == "left_out":
        count = asked.embedded.shape[1]
        alone = torch.eye(count, dtype=torch.bool, device=asked.embedded.device)
        without = torch.cat((torch.ones_like(alone[:1]), ~alone)).expand(len(asked.embedded), -1, -1)
        scores = asked.kept(without)
        return scores[:, :1] - scores[:, 1:]
    points, weights = ([1.0], [1.0]) if method == "gradient" else _legendre(steps)
    way = asked.embedded - asked.nothing
    at, weighs = (torch.tensor(each, dtype=way.dtype, device=way.device) for each in (points, weights))
    slopes = torch.zeros_like(way)
    with frozen(model):
        for texts, numbers in asked.rows(len(points)):
            with torch.enable_grad():
                vectors = (asked.nothing + at[numbers, None, None] * way[texts]).detach().requires_grad_()
                total = asked.score(vectors, texts).sum()
            (slope,) = torch.autograd.grad(total, [vectors])
            slopes.index_add_(0, texts, weighs[numbers, None, None] * slope)
    return (slopes * way).sum(-1)


def _legendre(steps: int) -> tuple[list[float], list[float]]:
    """Points between 0 and 1, and their weights."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    return ((points + 1) / 2).tolist(), (weights / 2).tolist()


class Curves:
    """What an answer scores while tokens are taken out of the text, or put into one that says nothing (1806.07421).

    asked: the answers. may: [B, T] bool, the tokens that may be moved. points: at which shares of them it is read.
    """

    def __init__(self, asked: Asked, may: Tensor, points: int = 16) -> None:
        self.asked, self.may, self.points = asked, may, points
        self.none, self.all = asked.kept(torch.stack((~may, torch.ones_like(may)), 1)).double().unbind(1)

    def areas(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """The areas under the two curves, [B] each, in units of the score: taking out, and putting in.

        order: [B, T], the tokens of the largest values move first. The score of a text that says nothing is taken off.
        """
        first = torch.where(self.may, order.double(), -torch.inf).argsort(stable=True, dim=-1, descending=True)
        rank = first.argsort(-1)
        share = torch.arange(1, self.points, device=order.device) / self.points
        moved = rank[:, None] < (share[:, None] * self.may.sum(-1)[:, None, None]).round()
        moved &= self.may[:, None]
        taken, put = ~moved, moved | ~self.may[:, None]
        inner = self.asked.kept(torch.cat((taken, put), 1)).double() - self.none[:, None]
        ends = (self.all - self.none) / 2  # of both curves, by the trapezoid rule
        out, into = inner.split(self.points - 1, 1)
        return (out.sum(1) + ends) / self.points, (into.sum(1) + ends) / self.points
