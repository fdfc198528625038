"""BABILong's small world: people who go to places, take, drop and give things, all stories of a batch at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contextlab.tasks.text.page import Pieces

ACTORS = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
MOVES = ("moved to", "went to", "journeyed to", "travelled to")
TAKES = ("picked up", "took", "got", "grabbed")
DROPS = ("dropped", "discarded", "put down", "left")
GIVES = ("gave", "handed", "passed")
MOVE, TAKE, DROP, GIVE = 0, 1, 2, 3

OBJECTLESS, GIVING = ("qa1", "qa6"), ("qa5", "qa7", "qa8")
OPENING = {
    "qa2": (MOVE, TAKE, MOVE),
    "qa3": (MOVE, TAKE, MOVE),
    "qa5": (MOVE, TAKE, GIVE),
    "qa7": (MOVE, TAKE),
    "qa8": (MOVE, TAKE),
}
"""What one person does at the beginning of a story, so that there is a question."""


class World(NamedTuple):
    """Stories that were simulated.

    actor, act, noun, other: [B, n] of each fact: who did what, to which place (0 to 5) or object (6 to 8), to whom it
    was given. at: [B, 4], where each person is; lies, before: [B, 3], where each object is, and where it was before
    that; holder: [B, 3]; -1 where it is not known, or nobody. moved, touched: [B, 4], the fact in which each person
    moved last, and that in which what they hold changed last; settled: [B, 3], in which each object came to its place.
    """

    actor: Tensor
    act: Tensor
    noun: Tensor
    other: Tensor
    at: Tensor
    lies: Tensor
    before: Tensor
    holder: Tensor
    moved: Tensor
    touched: Tensor
    settled: Tensor


class Told(NamedTuple):
    """A story as text. lines: [B, 4 n], four pieces a fact. question. answer: [B, 1], into ANSWERS. fact: [B]."""

    lines: Pieces
    question: Pieces
    answer: Tensor
    fact: Tensor


def simulate(task: str, count: int, batch: int, generator: torch.Generator, device: torch.device | str) -> World:
    """Draw stories of who goes where, and takes, drops and gives what."""
    rows = torch.arange(batch, device=device)
    at = torch.full((batch, len(ACTORS)), -1, device=device)  # where each is, -1 for not known
    moved, touched = at.clone(), at.clone()  # in which fact
    holder, lies, before, settled = (torch.full((batch, len(OBJECTS)), -1, device=device) for _ in range(4))
    told: list[tuple[Tensor, ...]] = []
    opening = OPENING.get(task, ())
    for step in range(count):
        draw = torch.rand(batch, 4, generator=generator, device=device)
        who = (draw[:, 0] * len(ACTORS)).long()
        if 0 < step < len(opening):
            who = told[0][0]
        here = at[rows, who].unsqueeze(1)
        can_take = (holder < 0) & (here >= 0) & ((lies == here) | (lies < 0))
        can_drop = holder == who.unsqueeze(1)
        if opening[step : step + 1] == (GIVE,):
            can_take = torch.zeros_like(can_take)
        # One of the possible takes and drops, evenly: the largest of random numbers.
        free = torch.rand(batch, len(OBJECTS), generator=generator, device=device)
        what = torch.where(can_take | can_drop, free, -1.0).argmax(1)
        touch = (can_take | can_drop).any(1) & (draw[:, 1] > 1 / 3)
        if step < len(opening) or task in OBJECTLESS:
            touch = torch.full_like(touch, opening[step : step + 1] not in ((), (MOVE,)))
        drop = touch & can_drop[rows, what]
        take = touch & ~drop
        give, other = torch.zeros_like(drop), torch.zeros_like(who)
        if task in GIVING:  # to someone who is there, or can be
            near = ((at == here) | (at < 0)).scatter(1, who.unsqueeze(1), False)
            other = torch.where(near, torch.rand(near.shape, generator=generator, device=device), -1.0).argmax(1)
            give = drop & near.any(1) & ((draw[:, 3] < 0.5) | (opening[step : step + 1] == (GIVE,)))
            drop = drop & ~give
        # A move leads to one of the other places.
        go = (draw[:, 2] * (len(PLACES) - (here[:, 0] >= 0).long())).long()
        go = go + ((here[:, 0] >= 0) & (go >= here[:, 0])).long()
        act = torch.where(take, TAKE, torch.where(drop, DROP, torch.where(give, GIVE, MOVE)))
        told.append((who, act, torch.where(touch, what + len(PLACES), go), other))
        at[rows, who] = torch.where(touch, here[:, 0], go)
        moved[rows, who] = torch.where(touch, moved[rows, who], step)
        touched[rows, who] = torch.where(touch, step, touched[rows, who])
        at[rows, other] = torch.where(give, here[:, 0], at[rows, other])
        touched[rows, other] = torch.where(give, step, touched[rows, other])
        kept = torch.where(drop, -1, torch.where(give, other, holder[rows, what]))
        holder[rows, what] = torch.where(take, who, kept)
        place = at.gather(1, holder.clamp_min(0))  # of what is held: where its holder is
        changed = (holder >= 0) & (place != lies)
        before = torch.where(changed, lies, before)
        settled = torch.where(changed, step, settled)
        lies = torch.where(changed, place, lies)
    actor, act, noun, to = (torch.stack(each, 1) for each in zip(*told, strict=True))
    return World(actor, act, noun, to, at, lies, before, holder, moved, touched, settled)
