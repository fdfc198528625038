"""Language modelling on any text: the next byte, or token, of a document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.learners.text import ContextNgram
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import TokenTask, check_options
from contextlab.tasks.text.codec import Codec, codec
from contextlab.tasks.text.corpus import PYTHON, Corpus, Part, check_corpus, load


@register("task", "language_modelling", family="text", papers=("2401.12973",), cases=({"length": 64},))
@dataclass(frozen=True)
class LanguageModelling(TokenTask):
    """The next token of a text: a window of one document, every place of it scored.

    All windows of a part's documents are equally likely. `shot` is the number of tokens seen, so that curves by shot
    are the loss by position; their fall is what the model learns about the document in context. The best known
    learner has read nothing but the prompt: an n-gram model in context, which a trained model beats by what it knows
    of the language. Documents of the test part are in no training prompt (see `contextlab.tasks.text.corpus`).

    corpus: "python", the sources of the standard library on this machine, or the path of a text file or a folder.
    length: tokens in the prompt.
    part: documents to draw from, "train" or "test".
    tokenizer: null for bytes, a folder with tokenizer.json, a Hugging Face hub name, or an object (encode, decode).
    """

    metric: ClassVar[str] = "cross_entropy"
    unbounded: ClassVar[tuple[str, ...]] = ("length",)
    higher_is_better: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"easy": {"length": 128}, "hard": {"length": 4096}}

    corpus: str = PYTHON
    length: PositiveInt = 512
    part: Part = "train"
    tokenizer: Any = None

    def __post_init__(self) -> None:
        check_options(self)
        check_corpus(self.corpus, self.length + 1, self.part, self.codec)

    @property
    def codec(self) -> Codec:
        return codec(self.tokenizer)

    @property
    def documents(self) -> Corpus:
        """The documents that prompts are drawn from."""
        return load(self.corpus, self.part, self.codec)

    @property
    def input_size(self) -> int:
        return self.codec.size

    def symbol(self, token: int) -> str:
        """A token's text."""
        return self.text([token])

    def text(self, tokens: Sequence[int]) -> str:
        """See `Task.text`."""
        return self.codec.decode(tokens)

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The text, and in brackets the token that should come next."""
        return self.codec.decode(prompt.inputs[row].tolist()) + f"[{self.symbol(int(prompt.targets[row, -1]))}]"

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts: inputs and targets (the inputs one later) [batch, length] int64."""
        documents = self.documents.to(device)
        start = documents.windows(batch, self.length + 1, generator)
        tokens = documents.tokens[start.unsqueeze(1) + torch.arange(self.length + 1, device=device)].long()
        shape = (batch, self.length)
        seen = torch.arange(1, self.length + 1, device=device).expand(shape)
        scored = torch.ones(shape, dtype=torch.bool, device=device)
        return Prompt(tokens[:, :-1], tokens[:, 1:], scored, seen)

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """cross_entropy in nats, the same as bits (per byte, when tokens are bytes), and accuracy, [B, T]."""
        found = super().errors(prediction, prompt)
        return {**found, "bits": found["cross_entropy"] / math.log(2)}

    def learners(self) -> dict[str, Learner]:
        """n-grams of the prompt itself, from long contexts to none; below some hundred bytes 3 beat 6."""
        return {
            f"{order}-gram" if order > 1 else "unigram": ContextNgram(self.output_size, order) for order in (6, 3, 2, 1)
        }

    def splits(self) -> dict[str, Task]:
        """'train', then documents that no training prompt holds: of the same length, and twice as long."""
        found: dict[str, Task] = {"train": self, "documents=test": self.replace(part="test")}
        if load(self.corpus, "test", self.codec).longest > 2 * self.length:
            found[f"length={2 * self.length}"] = self.replace(part="test", length=2 * self.length)
        return found

    def chance(self) -> Mapping[str, float]:
        """All tokens equally likely."""
        return {"cross_entropy": math.log(self.output_size), "bits": math.log2(self.output_size)}
