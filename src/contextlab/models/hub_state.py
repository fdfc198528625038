"""What a model of transformers is, and what it remembers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ModelWrapValidatorHandler, model_validator
from torch import Tensor

from contextlab.spec import Spec
from contextlab.state import State


class HuggingFaceSpec(Spec):
    """What a Hugging Face model is.

    kind: its `model_type`. config: its configuration, as `config.json` holds it.
    input_size, output_size: token ids. read_in: always "token".
    """

    kind: str
    config: dict[str, Any]
    input_size: int
    output_size: int
    read_in: Literal["token"] = "token"

    @model_validator(mode="wrap")
    @classmethod
    def _numbers(cls, data: Any, handler: ModelWrapValidatorHandler[HuggingFaceSpec]) -> HuggingFaceSpec:
        """Any numbers: configurations of transformers hold infinities, where they limit nothing."""
        return handler(data)


@dataclass
class HuggingFaceState(State):
    """What a Hugging Face model remembers: the tensors of its cache.

    leaves: the tensors that have the batch first and the states that policies left, in the order of their slots in
        `form`.
    start: [B] int64, the left-padding tokens of each row.
    form: the cache with empty slots in their places.
    padded: whether any piece came with a mask.
    """

    leaves: list[Tensor | State]
    start: Tensor
    form: Any = dataclasses.field(default=None, metadata={"static": True})
    padded: bool = dataclasses.field(default=False, metadata={"static": True})


@dataclass
class RaggedState(State):
    """What a Hugging Face model remembers of rows of unequal length.

    parts: the states of rows of equal length, without padding, each of at least one token.
    rows: for each part, which rows of the batch it holds, in its order; rows that it names nowhere have had no token.
    batch: number of rows.
    """

    parts: list[HuggingFaceState]
    rows: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), metadata={"static": True})
    batch: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def start(self) -> Tensor:
        """[B] int64, the padding tokens of each row."""
        start = torch.full((self.batch,), self.length)
        for part, rows in zip(self.parts, self.rows, strict=True):
            start[list(rows)] -= part.length
        return start

    def select(self, rows: Tensor) -> RaggedState:
        """See `State.select`."""
        wanted = rows.tolist()
        parts, places = list[HuggingFaceState](), []
        for part, own in zip(self.parts, self.rows, strict=True):
            at = {row: index for index, row in enumerate(own)}
            here = tuple(place for place, row in enumerate(wanted) if row % self.batch in at)
            if here:
                picked = torch.tensor([at[wanted[place] % self.batch] for place in here])
                parts.append(part.select(picked.to(part.start.device)))
                places.append(here)
        return dataclasses.replace(self, parts=parts, rows=tuple(places), batch=len(wanted))

    def mapped(self, change: Callable[[HuggingFaceState], HuggingFaceState]) -> RaggedState:
        """The same rows with `change` applied to each part."""
        return dataclasses.replace(self, parts=[change(part) for part in self.parts])
