"""Several documents in one row, as `cu_seqlens` tells them: each is read as if it stood alone.

`cu_seqlens` is an int tensor [N + 1], as flash-attention and flash-linear-attention have it: document i is the tokens
from cu_seqlens[i] up to, not including, cu_seqlens[i + 1]; it begins with 0 and ends with the tokens of the row.

The row is cut into documents that become rows of a batch, by one gather; they are read, and put back by another. This
is right for whatever reads rows apart from one another and forward, or knows padding, and a document's bits do not
depend on what stands beside it but for how large the batch is. Documents of like length are read together: of what a
batch holds at least half are tokens, and there are at most log2(longest) + 1 batches. Attention in them costs at
most four times what it costs in each document alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.spec import describe

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Batch:
    """Some documents as rows.

    index: [n, longest] int64, where their tokens stand among all; at padding one of the document's own.
    mask: [n, longest] bool, False at padding; None where there is none.
    base: [n] int64, the place of a document's first token in this batch, laid out flat.
    documents: [n] int64 on the CPU, which they are.
    """

    index: Tensor
    mask: Tensor | None
    base: Tensor
    documents: Tensor

    def of(self, x: Tensor) -> Tensor:
        """What of x [B, T, ...] is these documents': [n, longest, ...]."""
        return x.flatten(0, 1).index_select(0, self.index.flatten()).unflatten(0, self.index.shape)


@dataclass(frozen=True)
class Documents:
    """Where documents stand in tokens that are laid out flat, row after row.

    first, length: [N] int64 on the CPU, the place of a document's first token, and its tokens.
    shape: (B, T) of the rows; what belongs to no document is padding.
    device: of the tokens.
    """

    first: Tensor
    length: Tensor
    shape: tuple[int, int]
    device: torch.device

    def __len__(self) -> int:
        return len(self.length)

    def rows(self, side: Side) -> Batch:
        """All documents in their order, in one batch, padded on one side to the longest."""
        return self._batch(torch.arange(len(self)), side)

    def batches(self, side: Side) -> list[Batch]:
        """The documents that have tokens, the longest first, in batches that are tokens for one half at least."""
        return [self._batch(documents, side) for documents in self._alike()]

    def back(self, batches: list[Batch], answers: list[Tensor]) -> Tensor:
        """What was answered to the batches, [n, longest, ...] each, where the tokens stood: [B, T, ...].

        Zero where no document is.
        """
        flat = torch.cat([answer.flatten(0, 1) for answer in answers])
        base = torch.zeros(len(self), dtype=torch.int64)
        offset = 0
        for batch, answer in zip(batches, answers, strict=True):
            base[batch.documents] = offset + batch.base
            offset += answer.shape[0] * answer.shape[1]
        total = int(self.length.sum())
        document = torch.repeat_interleave(torch.arange(len(self)), self.length)
        place = torch.arange(total) - (self.length.cumsum(0) - self.length)[document]
        found = (base[document] + place).to(self.device)
        if total == self.shape[0] * self.shape[1]:
            return flat.index_select(0, found).unflatten(0, self.shape)
        places = torch.full((self.shape[0] * self.shape[1],), len(flat), device=self.device)
        places[(self.first[document] + place).to(self.device)] = found
        flat = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
        return flat.index_select(0, places).unflatten(0, self.shape)

    def in_order(self, batches: list[Batch], answers: list[Tensor]) -> Tensor:
        """What was answered to each document of the batches, [n, ...] each, in the documents' order: [N, ...]."""
        order = torch.cat([batch.documents for batch in batches]).argsort()
        return torch.cat(answers).index_select(0, order.to(self.device))

    def _alike(self) -> Iterator[Tensor]:
        """Documents of like length."""
        order = self.length.argsort(descending=True, stable=True)
        sorted_, total = self.length[order], self.length[order].cumsum(0)
        start, end = 0, int((sorted_ > 0).sum())
        while start < end:
            before = int(total[start]) - int(sorted_[start])
            held = sorted_[start] * torch.arange(1, end - start + 1)
            stop = start + int((held <= 2 * (total[start:end] - before)).sum())  # the part that is tokens only falls
            yield order[start:stop]
            start = stop

    def _batch(self, documents: Tensor, side: Side) -> Batch:
        length = self.length[documents]
        longest = int(length.max())
        pad = (longest - length) if side == "left" else torch.zeros_like(length)
        base = torch.arange(len(documents)) * longest + pad
        first, many, pad = (x[:, None].to(self.device) for x in (self.first[documents], length, pad))
        place = torch.arange(longest, device=self.device) - pad
        real = (place >= 0) & (place < many)
        own = first + place.clamp_min(0).minimum((many - 1).clamp_min(0))
        index = own.clamp_max(self.shape[0] * self.shape[1] - 1)  # an empty document has no token of its own
        return Batch(index, None if bool((length == longest).all()) else real, base, documents)


def documents(cu_seqlens: Tensor, x: Tensor) -> Documents:
    """The documents of a packed row.

    cu_seqlens: [N + 1] integers from 0 to T, none below the one before; a document may be empty. x: [1, T, ...].

    Raises InputError for others.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.is_floating_point() or cu_seqlens.is_complex():
        kind = str(cu_seqlens.dtype)[6:] if isinstance(cu_seqlens, Tensor) else describe(cu_seqlens)
        raise InputError(f"cu_seqlens: expected a tensor of integers, got {kind}")
    if cu_seqlens.dtype == torch.bool or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        found = f"{str(cu_seqlens.dtype)[6:]} {list(cu_seqlens.shape)}"
        raise InputError(f"cu_seqlens: expected integers [documents + 1], two or more, got {found}")
    if x.ndim < 2 or x.shape[0] != 1:
        raise InputError(
            f"cu_seqlens: packed documents stand in one row, [1, T, ...], got {list(x.shape)}; flatten the rows"
        )
    ends, total = cu_seqlens.detach().to("cpu", torch.int64), x.shape[1]
    length = ends.diff()
    if int(ends[0]) != 0:
        raise InputError(f"cu_seqlens: expected 0 first, where the first document begins, got {int(ends[0])}")
    if bool((length < 0).any()):
        at = int((length < 0).nonzero()[0])
        raise InputError(
            f"cu_seqlens: expected no number below the one before, got {int(ends[at])}, then {int(ends[at + 1])}"
        )
    if int(ends[-1]) != total:
        raise InputError(f"cu_seqlens: expected the {total} tokens of the row last, got {int(ends[-1])}")
    if not total:
        raise InputError("cu_seqlens: expected documents with tokens, got none")
    return Documents(ends[:-1], length, (1, total), x.device)


def by_document(op: Callable[..., Any], cu_seqlens: Tensor, *tensors: Tensor | None, **options: Any) -> Tensor:
    """What a causal op gives for each packed document alone, forward and backward.

    op: any causal op of tensors [B, T, ...], for example `gated_delta_rule`. cu_seqlens: [N + 1] integers.
    tensors: its first arguments, [1, T, ...] each, cut into documents; None stays None.
    options: its other arguments, by name. A tensor [1, T, ...] of three axes or more is cut, too; all else is handed on
        as it is (`scale`, `g_gamma`, the `A` of `ssd`).

    Returns what the op gives first, [1, T, ...]. No resets stand between documents: a log decay of -inf would part
    them in ops that decay by the token, but attention, the delta rule without a decay and convolutions have none.
    Documents are rows of batches here, padded on the right, where no causal op looks; so all are served alike, the
    chunks of each begin with its first token, and the decays of one cost another no digits.

    Raises InputError for an op that reads both ways, for states, masks and places of one's own, and for other shapes.
    """
    name = getattr(op, "__name__", "op")
    if not tensors or tensors[0] is None:
        raise InputError(f"by_document: expected tensors [1, T, ...] for {name}, got none first")
    found = documents(cu_seqlens, tensors[0])
    for number, tensor in enumerate(tensors):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.shape[:2] != found.shape):
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else describe(tensor)
            raise InputError(
                f"by_document: expected [1, {found.shape[1]}, ...] as argument {number} of {name}, got {shape}; give "
                "by name what has no tokens"
            )
    why = _REFUSED_OPS.get(name.removeprefix("naive_"))
    if why is not None or options.get("causal") is False:
        raise InputError(f"by_document: {name} {why or 'reads both ways'}; expected a causal op")
    for key, value in options.items():
        if key in _REFUSED_OPTIONS and value is not None and value is not False:
            raise InputError(f"by_document: {key}: {_REFUSED_OPTIONS[key]}; leave it out")
    batches = found.batches("right")
    named = {key for key, x in options.items() if isinstance(x, Tensor) and x.ndim > 2 and x.shape[:2] == found.shape}
    answers = []
    for batch in batches:
        given = [None if x is None else batch.of(x) for x in tensors]
        others = {key: batch.of(x) if key in named else x for key, x in options.items()}
        answers.append(_first(op(*given, **others)))
    return found.back(batches, answers)


_NO_STATE = "each document begins without a state and leaves none"
_OWN_PLACES = "documents are padded and placed here"
_REFUSED_OPTIONS = dict.fromkeys(("initial_state", "state", "output_final_state"), _NO_STATE) | dict.fromkeys(
    ("mask", "places", "q_position", "k_position"), _OWN_PLACES
)
_REFUSED_OPS = {
    "neighbourhood_attention": "reads both ways",
    "landmark_attention": "takes landmarks of a row's blocks",
    "log_linear_chunk": "reads one chunk",
    "window_attention": "takes places; softmax_attention has a window, too",
}


def _first(result: Any) -> Tensor:
    first: Tensor = result[0] if isinstance(result, tuple) else result
    return first
