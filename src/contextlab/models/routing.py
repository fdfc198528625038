"""Mixture-of-Depths: a router that sends some tokens through a block, and the others past it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers.layers import with_loss
from contextlab.models.skip import LEEWAY, SkipSpec
from contextlab.state import State, own

SPREAD = 0.1
"""Standard deviation of a fresh router's scores: blocks start weighted by 1, give or take a tenth."""

Through = Callable[..., tuple[Tensor, State | None]]
"""A block as it is for the tokens that go through: (x, state, mask, keep_state, tokens) -> (stream, state)."""


@dataclass
class RoutedState(State):
    """What a block that tokens may skip remembers: for each row the state of the text of those that went through.

    Rows of which as many tokens went through are read, and held, together; rows that part stay apart.

    groups: a state for the rows of each group; None where nothing has gone through. rows: their numbers.
    seen: [B] int64, tokens of each row so far, padding not counted.
    """

    groups: list[State | None]
    seen: Tensor
    rows: tuple[tuple[int, ...], ...] = field(default=(), metadata={"static": True})

    @classmethod
    def empty(cls, x: Tensor) -> RoutedState:
        """That of nothing read, for tokens like x [B, T, D]."""
        seen = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return cls([None], seen, (tuple(range(len(x))),))

    def through(self) -> list[int]:
        """Tokens of each row that went through."""
        counts = [0] * len(self.seen)
        for group, rows in zip(self.groups, self.rows, strict=True):
            for row in rows:
                counts[row] = 0 if group is None else group.length
        return counts

    def select(self, rows: Tensor) -> RoutedState:
        """See `State.select`."""
        wanted: list[int] = rows.tolist()
        groups, numbers = list[State | None](), list[tuple[int, ...]]()
        for group, held in zip(self.groups, self.rows, strict=True):
            places = {row: place for place, row in enumerate(held)}
            picks = tuple(number for number, row in enumerate(wanted) if row in places)
            if picks:
                picked = torch.tensor([places[wanted[number]] for number in picks])
                groups.append(None if group is None else group.select(picked))
                numbers.append(picks)
        seen = self.seen.index_select(0, rows.to(self.seen.device))
        return RoutedState(groups, seen, tuple(numbers), length=self.length)


class Router(nn.Module):
    """Which tokens go through a block, and how much what it adds to them counts (Mixture-of-Depths, 2404.02258).

    A token x with the score s = w . x / rms(x) that goes through becomes x + (1 + s)(block(x) - x); any other stays x.
    In training those of a text with the highest scores go through, a fixed share (eq. 1; expert choice). That looks at
    tokens to come, so a token that is read outside of training, or with a state, decides by itself: it goes through
    where u . x / rms(x) + b > 0, a second router that is trained by cross-entropy to tell the chosen ones and gives the
    stream no gradient (section 3.5, the second of the paper's two ways; the first, which draws the scores themselves to
    either side of 0, changes what is learned).

    It differs from the paper in that the weight is 1 + s, not s, so that blocks of a trained model begin as they were;
    that the router reads normed vectors; that the second router is linear; and that of n tokens read causally at most
    ceil(share n) + ahead go through, the first that would, so that the size of the state is bounded. To the block's
    mixer those that went through are the whole text: positions, windows and decays count them alone.

    width: of the stream. skip: the share.
    """

    trains_alone = "which tokens go through a block depends on the data"
    refuses_policies = "a block that tokens may skip (skip) keeps a cache of its own form; policies are for the others"

    def __init__(self, width: int, skip: SkipSpec) -> None:
        super().__init__()
        self.skip = skip
        self.weight = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.weight, std=SPREAD * width**-0.5)
        self.choice = nn.Parameter(self.weight.detach() / SPREAD)
        even = 0.0 if skip.share == 1 else NormalDist().inv_cdf(skip.share)
        self.bias = nn.Parameter(torch.full((1,), even))

    def forward(
        self,
        block: Through,
        x: Tensor,
        state: State | None,
        mask: Tensor | None,
        keep_state: bool,
        tokens: Tensor | None,
    ) -> tuple[Tensor, State | None]:
        """x [B, T, D] -> the stream after the block [B, T, D], and a RoutedState. The rest as for `Block.forward`."""
        if state is not None and not isinstance(state, RoutedState):
            raise InputError(f"skip: expected the state of a block with a router, got a {type(state).__name__}")
        if not x.shape[1]:
            return x, (RoutedState.empty(x) if state is None else state) if keep_state else None
        normed = normed_stream(x)
        score, wish = normed @ self.weight.to(normed), normed.detach() @ self.choice.to(normed) + self.bias.to(normed)
        if self.training and not keep_state and state is None:
            chosen = self._best(score.detach(), mask)
            y = self._whole(block, x, chosen, score, tokens)
            if torch.is_grad_enabled():
                y = with_loss(y, _cross_entropy(wish, chosen, mask))
            return y, None
        before = RoutedState.empty(x) if state is None else state
        seen, chosen = self._in_turn(wish, before, mask)
        if state is None and not keep_state:
            return self._whole(block, x, chosen, score, tokens), None
        y, groups, rows = self._on(block, x, chosen, score, tokens, before)
        return y, RoutedState(groups, seen, rows, length=before.length + x.shape[1]) if keep_state else None

    def _best(self, score: Tensor, mask: Tensor | None) -> Tensor:
        """Where a row's best tokens are, [B, T] bool. score: [B, T]."""
        length = score.shape[1]
        place = torch.arange(length, device=score.device)
        if mask is None:
            count: Tensor | int = self.skip.chosen(length)
        else:
            score = score.masked_fill(~mask, float("-inf"))
            count = self._shared(mask.sum(1, keepdim=True))
        order = score.argsort(dim=1, descending=True, stable=True)
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, order, (place < count).expand(score.shape))

    def _in_turn(self, wish: Tensor, before: RoutedState, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens of each row after these [B], and where those are that go through [B, T] bool.

        Each in turn goes through where it would and there is room: of t tokens at most r_t. Then as many have gone
        through after t as n_t = min(n_(t - 1) + w_t, r_t), with w_t = 1 of those that would, else 0; unrolled, n_t is
        W_t + min(n_0, r_1 - W_1, .., r_t - W_t), with W the running sum of w.
        """
        real = torch.ones_like(wish, dtype=torch.bool) if mask is None else mask
        seen = before.seen[:, None] + real.cumsum(1)
        if self.skip.share == 1:
            return own(seen[:, -1]), real
        would = ((wish > 0) & real).cumsum(1)
        start = torch.tensor(before.through(), device=wish.device)[:, None]
        room = torch.minimum(seen, self._shared(seen) + self.skip.ahead)
        through = would + torch.minimum(start, (room - would).cummin(1).values)
        return own(seen[:, -1]), through > torch.cat((start, through[:, :-1]), 1)

    def _shared(self, tokens: Tensor) -> Tensor:
        """`SkipSpec.chosen` of counts, int64 of any shape."""
        return torch.minimum(tokens, (self.skip.share * tokens.double() - LEEWAY).ceil().long())

    def _whole(self, block: Through, x: Tensor, chosen: Tensor, score: Tensor, tokens: Tensor | None) -> Tensor:
        """The stream after the block, all rows read together: those of fewer chosen tokens are padded on the left."""
        counts = chosen.sum(1)
        most = max(1, int(counts.max()))
        index = chosen.to(torch.uint8).argsort(dim=1, stable=True)[
            :, x.shape[1] - most :
        ]  # the chosen ones last, in order
        there = chosen.gather(1, index)
        given = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        mask = None if bool(there.all()) else there
        read = given if mask is None else given.masked_fill(~mask[..., None], 0.0)
        y, _ = block(read, None, mask, False, None if tokens is None else tokens.gather(1, index))
        after = torch.where(there[..., None], weighted(read, y, score.gather(1, index)), given).to(x.dtype)
        return x.scatter(1, index[..., None].expand_as(after), after)

    @staticmethod
    def _on(
        block: Through, x: Tensor, chosen: Tensor, score: Tensor, tokens: Tensor | None, before: RoutedState
    ) -> tuple[Tensor, list[State | None], tuple[tuple[int, ...], ...]]:
        """The stream after the block, read on from a state; the groups' states and their rows."""
        counts: list[int] = chosen.sum(1).tolist()
        groups, numbers = list[State | None](), list[tuple[int, ...]]()
        for group, rows in zip(before.groups, before.rows, strict=True):
            alike: dict[int, list[int]] = {}
            for place, row in enumerate(rows):
                alike.setdefault(counts[row], []).append(place)
            for count, places in sorted(alike.items()):
                after = group
                if group is not None and len(places) < len(rows):
                    after = group.select(torch.tensor(places))
                mine = [rows[place] for place in places]
                if count:
                    number = torch.tensor(mine, device=x.device)
                    at = number[:, None], chosen[number].nonzero()[:, 1].view(len(mine), count)
                    y, after = block(x[at], after, None, True, None if tokens is None else tokens[at])
                    x = x.index_put(at, weighted(x[at], y, score[at]).to(x.dtype))
                groups.append(after)
                numbers.append(tuple(mine))
        return x, groups, tuple(numbers)

    def flops(self, length: int) -> int:
        """Multiply-adds x 2 of choosing among `length` tokens."""
        return 4 * length * len(self.weight)


def normed_stream(x: Tensor) -> Tensor:
    """x / rms(x) of vectors x [..., D], in float32 at least."""
    return F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:])


def weighted(x: Tensor, y: Tensor, score: Tensor) -> Tensor:
    """x + (1 + s)(y - x), and exactly y where s is 0. x, y: [B, T, D]. score: [B, T]."""
    return y + score[..., None].to(y.dtype) * (y - x)


def _cross_entropy(wish: Tensor, chosen: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over tokens. wish: [B, T], logits. chosen: [B, T] bool."""
    each: Any = F.binary_cross_entropy_with_logits(wish, chosen.to(wish.dtype), reduction="none")
    return each.mean() if mask is None else each[mask].sum() / mask.sum().clamp_min(1)
