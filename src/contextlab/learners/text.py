"""Learners that read text: n-grams of the prompt itself, parsers of its question, and compressors to compare with."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError, unknown
from contextlab.learners.answers import sure_of
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

CHUNK = 2**24
"""Numbers in a [rows, T, T] or [rows, T, vocabulary] tensor that the n-gram learner holds at a time."""


@register(
    "learner",
    "context_ngram",
    family="text",
    papers=("2401.12973",),
    cases=({"vocabulary": 256}, {"vocabulary": 256, "order": 2}),
)
@dataclass(frozen=True)
class ContextNgram(Learner):
    """An n-gram model of what the prompt has shown so far, all orders interpolated (Kneser-Ney).

    Order k takes `discount` off the count of every token that it saw after the last k - 1 tokens, and leaves what it
    took to order k - 1; what the shortest leaves is spread evenly. The longest order counts occurrences, shorter
    ones count the different tokens that stood before them. Nothing is known but the prompt.

    vocabulary: number of symbols that can be predicted (the width of the logits).
    order: n, the longest n-gram; 1 counts tokens only.
    discount: taken off each count, above 0 and below 1.
    """

    vocabulary: PositiveInt
    order: PositiveInt = 6
    discount: Annotated[float, Field(gt=0, lt=1)] = 0.75

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, vocabulary], float32. Raises InputError for prompts that are no token ids."""
        tokens = token_ids(prompt, self.vocabulary, "context_ngram")
        rows = max(1, CHUNK // (tokens.shape[1] * max(tokens.shape[1], self.vocabulary)))
        return torch.cat([self._predict(part) for part in tokens.split(rows)])

    def _predict(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        earlier = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril(-1)
        equal = (tokens.unsqueeze(2) == tokens.unsqueeze(1)) & earlier
        # same[k][b, t, s]: the k tokens that end at t are those that end at s, s < t.
        same = [earlier.expand(batch, -1, -1), equal]
        for _ in range(self.order - 1):
            same.append(equal & F.pad(same[-1][:, :-1, :-1], (1, 0, 1, 0)))
        # fresh[k][b, 1, s]: the k + 1 tokens that end at s + 1 are new together.
        fresh = [F.pad(~each[:, 1:].any(2), (0, 1)).unsqueeze(1) for each in same[1:]]
        weight = torch.zeros(batch, length, length, device=tokens.device)  # of the token after s, in the prediction
        rest = torch.ones(batch, length, 1, device=tokens.device)
        for size in range(self.order - 1, -1, -1):
            seen = same[size] if size == self.order - 1 else same[size] & fresh[size + 1]
            kinds = same[size] & fresh[size]
            # Nothing stands before the first token: no context but the empty one has been seen before it.
            count = seen.sum(2, keepdim=True) + (size == 0)
            share = rest / count.clamp_min(1)
            weight += share * (seen.float() - self.discount * kinds.float())
            rest = torch.where(count > 0, share * self.discount * (kinds.sum(2, keepdim=True) + (size == 0)), rest)
        shown = F.one_hot(tokens, self.vocabulary).float()
        found = weight @ F.pad(shown[:, 1:], (0, 0, 0, 1)) + share * (1 - self.discount) * shown[:, :1]
        return (found + rest / self.vocabulary).log()


class Codec(Protocol):
    """Text to token ids and back, as `Reader` needs it."""

    @property
    def is_bytes(self) -> bool:
        """Whether a space is a token of its own."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""


@register("learner", "reader", family="text", cases=())
@dataclass(frozen=True)
class Reader(Learner):
    """Parses the text of a prompt up to where its answer begins, and writes down the answer that it finds.

    Token i of the answer goes to the i-th scored place; predictions are uniform everywhere else, and where the text
    gives no answer.

    vocabulary: number of symbols that can be predicted (the width of the logits).
    read: the strings that answer a text, each encoded on its own; one that follows a space begins with it, and where
        a space is a token of its own, it is not of the answer.
    codec: how the prompts' text is encoded.
    """

    vocabulary: PositiveInt
    read: Callable[[str], list[str]]
    codec: Any

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, vocabulary], float32. Raises InputError for prompts that are no token ids."""
        tokens = token_ids(prompt, self.vocabulary, "reader")
        begin = prompt.scored.int().argmax(1).tolist()
        answers = []
        for ids, t in zip(tokens.tolist(), begin, strict=True):
            try:
                strings = self.read(self.codec.decode(ids[: t + 1]))
            except (LookupError, ValueError):  # what the reader looks for is not there
                strings = []
            answers.append(
                [i for each in strings for i in self.codec.encode(each.lstrip(" ") if self.codec.is_bytes else each)]
            )
        width = max(map(len, answers), default=0) + 1
        table = torch.tensor([ids + [-1] * (width - len(ids)) for ids in answers], device=tokens.device)
        number = (prompt.scored.long().cumsum(1) - 1).clamp(0, width - 1)  # the last of the table is none
        answer = torch.where(prompt.scored, table.gather(1, number), -1)
        return sure_of(answer.clamp_min(0), answer >= 0, self.vocabulary)


MIN, MAX, MED, SUM = 10, 11, 12, 13
"""The ids of ListOps' operators, each with its opening bracket; digits are 0 to 9, the closing bracket is 14, = 15."""


@register("learner", "listops_evaluator", family="text", papers=("2011.04006",), cases=({}, {"depth": 6}))
@dataclass(frozen=True)
class ListOpsEvaluator(Learner):
    """Evaluates a ListOps expression symbol by symbol, with a stack of open lists; answers at "=".

    An open list is remembered by how often it holds each digit, of which all four operators can be told.

    depth: most lists that can be open at once, and one.
    """

    depth: PositiveInt = 10

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, 17], float32. Raises InputError for other prompts and for deeper expressions."""
        tokens = token_ids(prompt, 17, "listops_evaluator")
        batch, device = len(tokens), tokens.device
        digit, row = torch.arange(10, device=device), torch.arange(batch, device=device)
        counts = torch.zeros(batch, self.depth + 1, 10, dtype=torch.int64, device=device)  # level 0 holds the answer
        operators = torch.zeros(batch, self.depth + 1, dtype=torch.int64, device=device)
        top = torch.zeros(batch, dtype=torch.int64, device=device)
        results = []
        for token in tokens.unbind(1):
            opens, closes = (token >= MIN) & (token <= SUM), (token == SUM + 1) & (top > 0)
            occurrences = counts[row, top]
            running = occurrences.cumsum(1)
            number = running[:, -1:]
            # The digit of rank r is the number of digits that at most r of the list's are below or equal to.
            low, high = ((running <= rank).sum(1) for rank in (0, number - 1))
            middle = ((running <= (number - 1) // 2).sum(1) + (running <= number // 2).sum(1)) // 2
            operator = operators[row, top]
            value = torch.stack([low, high, middle, (occurrences * digit).sum(1) % 10])
            value = value[(operator - MIN).clamp_min(0), row]
            top = top + opens.long() - closes.long()
            if int(top.max()) > self.depth:
                raise InputError(f"listops_evaluator: more than {self.depth} lists are open; choose a greater depth")
            operators[row, top] = torch.where(opens, token, operators[row, top])
            counts[row, top] = torch.where(opens.unsqueeze(1), 0, counts[row, top])
            value = torch.where(token < 10, token, value)
            counts[row, top] += ((token < 10) | closes).unsqueeze(1) * (digit == value.unsqueeze(1))
            results.append(counts[:, 0].argmax(1))
        return sure_of(torch.stack(results, 1), tokens == SUM + 2, 17)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "zlib": lambda data: zlib.compress(data, 9, -15),
    "bz2": lambda data: bz2.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}]),
}
"""Bytes to fewer bytes; headers that can be left out are."""


def compressed_bits(tokens: Tensor, compressor: Literal["zlib", "bz2", "lzma"] = "lzma") -> Tensor:
    """Bits a byte that a compressor needs for each row, [B] float64; the reference that language models are held to.

    Not a `Learner`: a compressor codes a whole row and says nothing of the next byte, so its bits compare with the
    mean of a model's `bits` over the row (of which a row of T tokens predicts T - 1, or T with the one after it).

    tokens: [B, T], the ids of bytes.
    """
    if compressor not in COMPRESSORS:
        raise InputError(unknown("compressor", compressor, COMPRESSORS))
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < 256:
        raise InputError(f"compressed_bits reads bytes, ids 0 to 255, and got {int(tokens.max())}")
    squeeze = COMPRESSORS[compressor]
    rows = tokens.to("cpu", torch.uint8).numpy()
    return torch.tensor([8 * len(squeeze(row.tobytes())) / len(row) for row in rows], dtype=torch.float64)


def token_ids(prompt: Prompt, vocabulary: int, name: str) -> Tensor:
    """The prompt's tokens [B, T] int64. Raises InputError when there are none, or ids beyond the vocabulary."""
    tokens = prompt.inputs
    if tokens.is_floating_point():
        raise InputError(f"{name} needs a prompt of token ids, such as language_modelling draws; this one has vectors")
    if tokens.numel() and int(tokens.max()) >= vocabulary:
        raise InputError(f"{name} has vocabulary {vocabulary}, but the prompt holds token {int(tokens.max())}")
    return tokens
