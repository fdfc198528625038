"""Routers are put in a trained model: tokens that a block would change least go past it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from contextlab.convert.base import Change, Conversion, Converted, copied, module_nbytes
from contextlab.convert.calibration import Calibration
from contextlab.convert.depth.blocks import read_watched
from contextlab.errors import InputError
from contextlab.models import LayerSpec, Model, ModelSpec, SkipSpec
from contextlab.models.changes import shortest_pattern
from contextlab.models.routing import SPREAD, Router, normed_stream
from contextlab.registry import register

ROWS = 4096
"""Tokens, at most, that a block's router is fitted to."""
RIDGE = 1e-3
"""Added to the moments of the tokens, as a share of their mean."""

TIED = 1e-6
"""Scores that are nearer to one another, in spreads, are equal."""


@register(
    "conversion",
    "mod",
    family="depth",
    papers=("2404.02258",),
    cases=({}, {"share": 0.3, "every": 1, "ahead": 1}),
)
@dataclass(frozen=True)
class MixtureOfDepths(Conversion):
    """A router in some blocks lets a share of the tokens through, and the others past: less time, and less state.

    Mixture-of-Depths (2404.02258; `Router` says how tokens are chosen) trains such models from nothing. In a trained
    one each router starts as the linear map of the normed stream that tells best, by least squares on the data, how
    far the block moves a token, log ||block(x) - x|| / ||x||: those that it would move least go past it. The threshold
    lets the share of the data's tokens through. Blocks weigh what they add by 1, give or take a tenth, which healing
    changes; with it the model learns to do with fewer tokens. Positions, windows and decays of a mixer count the tokens
    that went through it. Each line's error is how far the stream after the block turns by it: 1 - the mean cosine
    between the stream with the router and without, on the data.

    share: of the tokens that go through; 1 leaves the model as it is.
    every: routers in every second block, say: 1, 3, 5, .. of 2, as in the paper; in all of 1.
    ahead: tokens beyond the share that may have gone through at any place of a text.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    nothing: ClassVar[Mapping[str, Any] | None] = {"share": 1.0}

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    every: PositiveInt = 2
    ahead: NonNegativeInt = 8

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """With routers. Raises InputError where there is no such block, or tokens cannot go past one of them."""
        if self.share == 1:
            return spec
        layers = spec.pattern()
        if self.every > spec.depth:
            raise InputError(f"every: the model has {spec.depth} blocks, so at most {spec.depth}, got {self.every}")
        for i in self._places(spec):
            if layers[i].share is not None or layers[i].skip is not None:
                what = "shares its weights with others" if layers[i].skip is None else "has a router already"
                raise InputError(f"mod: blocks.{i} {what}; choose other blocks by `every`")
            skip = SkipSpec(share=self.share, ahead=self.ahead)
            try:
                layers[i] = LayerSpec.parse({**layers[i].model_dump(), "skip": skip.model_dump()})
            except InputError as error:
                raise InputError(f"mod: blocks.{i}: {error}") from None
        pattern = [layer.model_dump() for layer in shortest_pattern(layers)]
        return ModelSpec.parse({**spec.model_dump(), "layers": pattern})

    def _places(self, spec: ModelSpec) -> list[int]:
        return list(range(self.every - 1, spec.depth, self.every))

    @torch.no_grad()
    def apply(self, model: Model, data: Calibration | None, generator: torch.Generator) -> Converted:
        """See `Conversion.apply`."""
        assert data is not None
        made, spec = copied(model), self.plan(model.spec)
        if spec is model.spec:
            return Converted(made)
        moves = moved_tokens(model, data, self._places(spec))
        for i, (tokens, far) in moves.items():
            block: Any = made.blocks[i]
            skip = spec.pattern()[i].skip
            assert skip is not None
            block.router = fitted_router(tokens, far, skip).to(next(model.parameters())).eval()
        made.spec = spec
        errors = _turned(model, made, data, list(moves))
        return Converted(
            made,
            [
                Change(
                    f"blocks.{i}", f"lets {self.share:.0%} of the tokens through, and {self.ahead} more at any place",
                    errors[i], "direction",
                    module_nbytes(model.blocks[i]), module_nbytes(made.blocks[i]),
                )
                for i in moves
            ],
        )  # fmt: skip


def moved_tokens(model: Model, data: Calibration, places: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """What some blocks read, normed [N, D], and how far they move it, log ||block(x) - x|| / ||x|| [N]; float64."""
    each = -(-ROWS // (len(data.batches) * model.spec.loops))
    found: dict[int, tuple[list[Tensor], list[Tensor]]] = {i: ([], []) for i in places}

    def hook(i: int) -> Any:
        def note(block: Any, given: tuple[Tensor, ...], got: Any) -> None:
            x, y = (tensor.detach().flatten(0, 1).double() for tensor in (given[0], got[0]))
            x, y = (tensor[:: max(1, len(tensor) // each)][:each] for tensor in (x, y))
            tiny = torch.finfo(x.dtype).tiny
            far = ((y - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(tiny)).clamp_min(tiny).log()
            found[i][0].append(normed_stream(x))
            found[i][1].append(far)

        return note

    read_watched(model, data, [(model.blocks[i], hook(i)) for i in places])
    return {i: (torch.cat(tokens), torch.cat(far)) for i, (tokens, far) in found.items()}


def fitted_router(tokens: Tensor, far: Tensor, skip: SkipSpec) -> Router:
    """A router whose scores are the linear map of tokens [N, D] nearest to `far` [N], of mean 0 and spread `SPREAD`.

    The share of the highest scores goes through.
    """
    centred = tokens - tokens.mean(0)
    moment = centred.T @ centred / len(tokens)
    small = RIDGE * moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
    moment.diagonal().add_(small)
    weight = torch.linalg.solve(moment, centred.T @ (far - far.mean()) / len(tokens))
    score = tokens @ weight
    spread = score.std(correction=0)
    router = Router(tokens.shape[1], skip).to(tokens)
    if not spread > TIED:  # the block moves all alike: the first ones go through, as many as there is room for
        router.weight.zero_()
        router.choice.zero_()
        router.bias.fill_(1.0)
        return router
    router.weight.copy_(weight * SPREAD / spread)
    router.choice.copy_(weight / spread)
    router.bias.fill_(-threshold(score / spread, skip.chosen(len(score))))
    return router


def threshold(score: Tensor, count: int) -> float:
    """A number that about the `count` highest of the scores [N] are above, and no score is near to.

    Equal tokens have equal scores, of which rounding must not choose: it is in the gap that parts nearest to so many.
    """
    best = score.sort(descending=True).values
    gaps = (best[:-1] - best[1:] > TIED).nonzero()[:, 0] + 1
    nearest = int(gaps[(gaps - count).abs().argmin()])
    return float(best[nearest - 1 : nearest + 1].mean())


def _turned(model: Model, made: Model, data: Calibration, places: list[int]) -> dict[int, float]:
    """1 - the mean cosine between what blocks of the two models make of the stream of the first."""
    sums = {i: [0.0, 0.0] for i in places}

    def hook(i: int) -> Any:
        def note(block: Any, given: tuple[Any, ...], got: Any) -> None:
            x, _, mask, _, embedded, tokens = given
            y, _ = made.blocks[i](x, None, mask, False, embedded, tokens)
            cosines = torch.cosine_similarity(got[0].double(), y.double(), dim=-1)
            sums[i][0] += float(cosines.sum())
            sums[i][1] += cosines.numel()

        return note

    read_watched(model, data, [(model.blocks[i], hook(i)) for i in places])
    return {i: 1 - total / count for i, (total, count) in sums.items()}
