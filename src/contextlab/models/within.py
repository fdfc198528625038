"""What a caller wants of one reading of a model beyond its predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from contextlab.models.padding import Padding


@dataclass
class Within:
    """What a caller wants of one reading beyond its predictions.

    Layers are counted from 0, those of a looped model over all its loops.

    embedded: [B, T, D], in place of the read-in's vectors; layers that read token ids cannot do with it.
    hidden: takes the stream [B, T, D]: the embedded tokens, then what each block made of it, the last one normed.
    last: predict at these places of T only; None at all.
    used: takes, of a model with early exits, [B, T] int64: how many layers each token went through.
    early: takes, for each layer that is named, what the read-out predicts of the stream after it, [B, T, k].
    dropped: [layers, B] bool, which rows go past which layers; where no state is kept.
    stream: [B, T, D], what layer number `begin` was given in another reading of the same inputs: no layer before it is
        read, and its state stays as it is. None reads all. Without a state only of models that read their blocks once,
        each by the stream alone.
    end: no layer from this number on is read, and its state stays as it is; the predictions are what the read-out makes
        of the stream there. None reads all.
    given: takes what each layer that is read was given, [B, T, D], and the stream after the last of them.
    """

    embedded: Tensor | None = None
    hidden: list[Tensor] | None = None
    last: slice | Tensor | None = None
    used: list[Tensor] | None = None
    early: dict[int, Tensor | None] | None = None
    dropped: Tensor | None = None
    stream: Tensor | None = None
    begin: int = 0
    end: int | None = None
    given: list[Tensor] | None = None

    def seen(self, x: Tensor, padded: Padding) -> None:
        """Take x [B, T, D] into `hidden` as the inputs stood, where that is wanted."""
        if self.hidden is not None:
            self.hidden.append(padded.back(x))

    def answered(self, layer: int, x: Tensor, read_out: Callable[[Tensor], Tensor]) -> None:
        """Take the predictions of the stream after a layer, x [B, T, D], where they are wanted."""
        if self.early is not None and layer in self.early:
            self.early[layer] = read_out(x)


def some_rows(
    block: Callable[..., Any],
    dropped: Tensor,
    x: Tensor,
    mask: Tensor | None,
    embedded: Tensor,
    tokens: Tensor | None,
) -> Tensor:
    """The stream after a block [B, T, D] that some rows go past, dropped [B] bool; the rest as for `Block.forward`."""
    kept = (~dropped).nonzero()[:, 0]
    if not len(kept):
        return x
    own = [None if each is None else each[kept] for each in (mask, tokens)]
    y: Tensor = block(x[kept], None, own[0], False, embedded[kept], own[1])[0]
    return x.index_copy(0, kept, y.to(x.dtype))
