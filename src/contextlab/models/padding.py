"""Where the rows of a batch are padded.

Layers know padding on the left: a row whose first tokens are none. Padding on the right is moved there, row by row,
before the layers read and back after them, so each row is answered as if it stood alone, and what follows goes on
from its own last token. Padding between two tokens of a row has no such reading, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from contextlab.errors import InputError


@dataclass(frozen=True)
class Padding:
    """How one piece of a batch is padded.

    mask: [B, T] bool as the layers want it, False at left padding; None where all are tokens.
    shift: [B] int64, by how many places a row is moved to the right; None where none is.
    waiting: for each row, whether it has had no token yet; None where all rows have.
    """

    mask: Tensor | None = None
    shift: Tensor | None = None
    waiting: tuple[bool, ...] | None = None

    def moved(self, x: Tensor) -> Tensor:
        """x [B, T, ...] with each row's padding on the left."""
        return x if self.shift is None else _rolled(x, self.shift)

    def back(self, y: Tensor) -> Tensor:
        """y [B, T, ...], what was answered to `moved` inputs, where the inputs stood."""
        return y if self.shift is None else _rolled(y, -self.shift)


def padding(mask: Tensor | None, inputs: Tensor, begun: bool, waiting: tuple[bool, ...] | None) -> Padding:
    """How a piece is padded, told from its mask.

    mask: [B, T] bool, where there are tokens, or None. inputs: [B, T, ...]. begun: whether anything was read before.
    waiting: of what was read before, `Padding.waiting`.

    Raises InputError for a mask of another shape or dtype, and where a row has padding after one of its tokens that
    another follows, in this piece or in one before.
    """
    if mask is None:
        return Padding()
    if mask.dtype != torch.bool or mask.shape != inputs.shape[:2]:
        found = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
        raise InputError(f"mask: expected bool {list(inputs.shape[:2])}, True where there are tokens, got {found}")
    batch, length = mask.shape
    real, place = mask.sum(1), torch.arange(length, device=mask.device)
    left = (mask == (place >= (length - real)[:, None])).all(1)
    shift = torch.where(left, 0, length - real)
    if torch.compiler.is_compiling():  # nothing may depend on values: all rows are moved, by nothing where they stand
        shift = torch.zeros_like(shift) if begun else shift
        return Padding(_rolled(mask, shift), None if begun else shift)
    right = (mask == (place < real[:, None])).all(1)
    rows: list[list[int]] = torch.stack((real, left, right)).T.tolist()
    before = [False] * batch if not begun else None
    had = before if before is not None else [not each for each in waiting] if waiting else [True] * batch
    for row, (tokens, at_left, at_right) in enumerate(rows):
        if tokens == length or (not tokens and not had[row]):
            continue
        if had[row]:
            where = "has padding after tokens that were read before; a row's tokens are read without gaps"
        elif begun and not at_left:
            where = "is padded on the right; in a piece that goes on from a state padding stands on the left"
        elif not at_left and not at_right:
            where = "has padding between its tokens; padding stands before or after all tokens of a row"
        else:
            continue
        raise InputError(f"mask: row {row} {where}")
    still = tuple(not h and not tokens for h, (tokens, *_) in zip(had, rows, strict=True))
    after = still if any(still) else None
    if all(at_left for _, at_left, _ in rows):
        return Padding(mask, None, after)
    return Padding(_rolled(mask, shift), shift, after)


def tokens_first(mask: Tensor) -> Padding:
    """How rows are moved so that their tokens come first, for readers that look backward only, which need no mask then.

    mask: [B, T] bool that `padding` takes at the start.
    """
    return Padding(None, -mask.to(torch.uint8).argmax(1))


def _rolled(x: Tensor, shift: Tensor) -> Tensor:
    """Each row of x [B, T, ...] turned by shift [B] places to the right."""
    length = x.shape[1]
    index = (torch.arange(length, device=x.device) - shift[:, None]) % length
    return x.gather(1, index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(x.shape))
