"""Documents that a model is given in rows: where `cu_seqlens` says, or where `position_ids` begin again at 0.

The model, not each of its mixers, reads them apart: they become rows of batches (`contextlab.ops.documents`), so this
is right for all mixers, positions, loops, shared layers and pooled read-outs alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.documents import Documents, Side, documents

if TYPE_CHECKING:
    from contextlab.models.stack import Model, Within


def packed(
    inputs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, position_ids: Tensor | None
) -> Documents | None:
    """Where the documents stand; None where each row is one, read as ever.

    inputs: [B, T, ...], B = 1 with cu_seqlens. mask: [B, T] bool, False at padding, or None; not with cu_seqlens.
    cu_seqlens: [N + 1] integers. position_ids: [B, T] or [1, T] integers, 0 at the first token of a document and one
        more at each that follows; any number at padding.

    Raises InputError for others, and where both are given and disagree.
    """
    if cu_seqlens is not None:
        found = of_row(cu_seqlens, inputs, mask)
        if position_ids is not None:
            other = _restarting(position_ids, None, inputs)
            if other.length.tolist() != [length for length in found.length.tolist() if length]:
                raise InputError("position_ids: they begin again at other tokens than cu_seqlens says; give one")
        return found
    if position_ids is None:
        return None
    found = _restarting(position_ids, mask, inputs)
    return found if len(found) > (inputs.shape[0] if mask is None else int(mask.any(1).sum())) else None


def of_row(cu_seqlens: Tensor, inputs: Tensor, mask: Tensor | None) -> Documents:
    """The documents of the one row inputs [1, T, ...]. cu_seqlens: [N + 1] integers. mask: None, or it is refused."""
    if mask is not None:
        raise InputError("cu_seqlens: packed documents have no padding; leave the mask out")
    return documents(cu_seqlens, inputs)


def unwatched(model: Any) -> None:
    """Raises InputError where somebody looks at what flows: each batch of documents would be a text of its own."""
    if model.heard is not None:
        raise InputError("capture and patch: not for packed documents; give them as rows of a batch, with a mask")


def by_document(model: Model, inputs: Tensor, found: Documents, within: Within | None) -> Tensor:
    """What a model predicts in each document as if it stood alone: [B, T, k], or [N, k] from a pooled read-out.

    inputs: [B, T, ...]. within: what else is wanted, of the rows as they were given. What causal mixers answer does not
        depend on padding on their right, so they need no mask.
    """
    pooled = model.spec.pool is not None
    forward_only = all(block.reads_forward for block in model.blocks)
    if pooled and not bool((found.length > 0).all()):
        raise InputError("cu_seqlens: a pooled read-out has nothing to pool in an empty document; leave it out")
    aside: Side = "right" if forward_only and not pooled else "left"
    batches = found.batches(aside)
    masks = [batch.mask if aside == "left" else None for batch in batches]
    embedded, hidden, last = (None, None, None) if within is None else (within.embedded, within.hidden, within.last)
    answers, streams = [], list[list[Tensor]]()
    for batch, mask in zip(batches, masks, strict=True):
        inner: dict[str, Any] = {}
        if within is not None and within.used is not None:
            raise InputError("within.used: not for packed documents; give them as rows of a batch")
        if within is not None:
            streams.append([])
            own = replace(within, embedded=None if embedded is None else batch.of(embedded), last=None)
            inner["within"] = replace(own, hidden=None if hidden is None else streams[-1])
        answers.append(model(batch.of(inputs), mask, **inner))
    if hidden is not None:
        hidden.extend(found.back(batches, list(layer)) for layer in zip(*streams, strict=True))
    if pooled:
        return found.in_order(batches, answers)
    predicted = found.back(batches, answers)
    return predicted if last is None else predicted[:, last]


def _restarting(position_ids: Tensor, mask: Tensor | None, inputs: Tensor) -> Documents:
    shape, device = inputs.shape[:2], inputs.device
    if position_ids.is_floating_point() or position_ids.shape not in (shape, (1, shape[1])):
        got = f"{str(position_ids.dtype)[6:]} {list(position_ids.shape)}"
        raise InputError(f"position_ids: expected integers {list(shape)}, got {got}")
    place = position_ids.to(device).expand(shape)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise InputError(f"mask: expected bool {list(shape)}, got {str(mask.dtype)[6:]} {list(mask.shape)}")
    real = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
    before = torch.cat((place.new_full((shape[0], 1), -1), torch.where(real, place, -1)[:, :-1]), 1)
    goes_on = (before >= 0) & (place == before + 1)
    wrong = real & (place != 0) & ~goes_on
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        due = f"{int(before[row, token]) + 1}, or 0 where a document begins" if token else "0"
        raise InputError(
            f"position_ids: expected {due}, got {int(place[row, token])} in row {row} at token {token}; our models "
            "count from the first token of a document or row"
        )
    starts = (real & (place == 0)).flatten()
    first = starts.nonzero().flatten()
    number = (starts.cumsum(0) - 1)[real.flatten()]
    length = torch.bincount(number, minlength=len(first))
    return Documents(first.cpu(), length.cpu(), (shape[0], shape[1]), device)
