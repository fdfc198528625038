"""Dictionaries as text: the value of one key among many, wherever it stands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.text import ContextNgram
from contextlab.prompt import Learner, Task
from contextlab.registry import register
from contextlab.tasks.text.base import AnswerTask
from contextlab.tasks.text.page import HEX, Page, Pieces, Story, after_space, cat, interleave, numerals, uuids


@register(
    "task", "kv_retrieval", family="text", papers=("2307.03172",), cases=({"pairs": 3}, {"pairs": 4, "position": 2})
)
@dataclass(frozen=True)
class KeyValueRetrieval(AnswerTask):
    """Lost in the middle: a JSON object of random UUIDs, one of whose keys is asked for; its position is swept.

    As the paper's generator has it: `pairs` distinct UUIDs, each with another as its value, one record a line, then the
    key and "Corresponding value:". The answer is the value in quotes, as the paper's object shows it; its characters
    but the quotes are scored. `splits` are the paper's sweep over the position of the pair, and twice the pairs.

    pairs: records in the object; the paper has 75, 140 and 300.
    position: of the record that is asked for, from 0; None draws it uniformly.
    tokenizer: null for bytes, a folder with tokenizer.json, a Hugging Face hub name, or an object (encode, decode).
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"easy": {"pairs": 3}, "hard": {"pairs": 75}}

    pairs: Annotated[int, Field(ge=2)] = 10
    position: Annotated[int, Field(ge=0)] | None = None
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.position, int) and isinstance(self.pairs, int) and self.position >= self.pairs > 0:
            raise InputError(f"position {self.position} is beyond the {self.pairs} pairs: choose 0 to {self.pairs - 1}")
        super().__post_init__()

    def compose(self, page: Page, batch: int, generator: torch.Generator) -> Story:
        """Draw the records and the position."""
        device, n = page.device, self.pairs
        codes = uuids((batch, 2 * n), generator, device)  # 2^122 of them: two alike will not be seen
        at = torch.randint(n, (batch, 1), generator=generator, device=device)
        if self.position is not None:
            at = torch.full_like(at, self.position)
        strings = page.spell(codes)
        keys, values = (Pieces(strings.start[:, i::2], strings.size[:, i::2]) for i in (0, 1))
        key, value = keys.take(at), values.take(at)
        opening, closing = page.text(*['{"', *[' "'] * (n - 1)]), page.text(*['",\n'] * (n - 1), '"}')
        records = interleave(opening, keys, page.text('": "'), values, closing)
        head = page.text(
            "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        )
        tail = cat(page.text('\n\nKey: "'), key, page.text('"\nCorresponding value: "'))
        references = codes.gather(1, (2 * at + 1).unsqueeze(2).expand(-1, -1, codes.shape[2]))
        return Story([head, records, tail], [(value, True)], (1 + 5 * at).squeeze(1), references)

    def read(self, text: str) -> list[str]:
        """The value of the record whose key is asked for."""
        asked = re.search(r'Key: "([0-9a-f-]+)"\nCorresponding value: "$', text)
        found = asked and re.search(rf'"{asked[1]}": "([0-9a-f-]+)"', text)
        return [found[1]] if found else []

    def alphabet(self) -> str:
        """Hexadecimal digits and the hyphen."""
        return HEX + "-"

    def learners(self) -> dict[str, Learner]:
        """`reader`, which makes no error, and n-grams of the prompt, which see little of the key."""
        return {**super().learners(), "6-gram": ContextNgram(self.output_size, 6)}

    def splits(self) -> dict[str, Task]:
        """'train', the position from the first to the last, and twice the pairs."""
        n = self.pairs
        found: dict[str, Task] = {"train": self}
        for position in sorted({0, n // 4, n // 2, 3 * n // 4, n - 1}):
            found[f"position={position}"] = self.replace(position=position)
        found[f"pairs={2 * n}"] = self.replace(pairs=2 * n, position=None)
        return found


HEAD = "Do a task using the list of dictionaries below.\n"
ASK = "\n\nAbove is a list of dictionaries such that each key and value is an integer. Report the value of key"
AGAIN = " and the dictionary it is in.\nThe value of key"
IS, AND = " is", " and it is in Dictionary ["
NUMBERS = (3, 4)
"""Digits of a key or value: how many is a coin's throw, then all numbers of that size are equally likely."""


@register("task", "dictionary_retrieval", family="text", papers=("2406.19292",), cases=({"dictionaries": 3},))
@dataclass(frozen=True)
class DictionaryRetrieval(AnswerTask):
    """Numerical dictionaries: a numbered list of small ones, then a key, whose value and dictionary are asked for.

    The paper's simple task: dictionaries of three or four entries (that of the key has three), keys and values integers
    of three or four digits, the key and its value in one place only. The answer is the paper's template, "The value of
    key K is V and it is in Dictionary [I].", of which V and I are scored. What differs: the paper's dictionaries merge
    entries of the same key, which these keep.

    dictionaries: how many; the paper has 85.
    position: of the dictionary that holds the key, from 0; None draws it uniformly.
    tokenizer: null for bytes, a folder with tokenizer.json, a Hugging Face hub name, or an object (encode, decode).
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"easy": {"dictionaries": 3}, "hard": {"dictionaries": 85}}

    dictionaries: PositiveInt = 12
    position: Annotated[int, Field(ge=0)] | None = None
    tokenizer: Any = None

    def __post_init__(self) -> None:
        count, position = self.dictionaries, self.position
        if isinstance(position, int) and isinstance(count, int) and position >= count > 0:
            raise InputError(f"position {position} is beyond the {count} dictionaries: choose 0 to {count - 1}")
        super().__post_init__()

    def compose(self, page: Page, batch: int, generator: torch.Generator) -> Story:
        """Draw the dictionaries and the one that is asked for."""
        device, n = page.device, self.dictionaries

        def number(*shape: int) -> Tensor:
            least = 10 ** (torch.randint(2, shape, generator=generator, device=device) + NUMBERS[0] - 1)
            return least + (torch.rand(shape, generator=generator, device=device) * (9 * least)).long()

        at = torch.randint(n, (batch, 1), generator=generator, device=device)
        if self.position is not None:
            at = torch.full_like(at, self.position)
        keys, values = number(batch, 4 * n), number(batch, 4 * n)
        own = 4 * at + torch.randint(3, (batch, 1), generator=generator, device=device)
        key, value = keys.gather(1, own), values.gather(1, own)
        for numbers, one in ((keys, key), (values, value)):
            while (same := (numbers == one).scatter(1, own, False)).any():  # the key and its value stand once
                numbers[same] = number(int(same.sum()))
        low, high = 10 ** (NUMBERS[0] - 1), 10 ** NUMBERS[1]
        plain = page.text(*(str(i) for i in range(low, high)))
        spaced = page.text(*(f" {i}" for i in range(low, high)))
        fourth = torch.randint(2, (batch, n), generator=generator, device=device).bool().scatter(1, at, False)
        present = torch.ones(batch, n, 4, dtype=torch.bool, device=device)
        present[..., 3] = fourth
        present = present.flatten(1)
        # Before each entry: the first of a dictionary is opened, the others follow a comma.
        names = page.text(*(str(i + 1) for i in range(n)))
        first = torch.arange(4 * n, device=device) % 4 == 0
        named = Pieces(names.start.repeat_interleave(4, 1), names.size.repeat_interleave(4, 1) * first)
        opening = page.text(*(["\nDictionary [", ",", ",", ","] * n))
        braces = page.text(*(["] {", "", "", ""] * n))
        closing = page.text(*(["", "", "", "}"] * n))
        entries = interleave(
            opening.where(present),
            named.where(present),
            braces.where(present),
            plain.take(keys - low).where(first.expand_as(keys)),
            spaced.take(keys - low).where(present & ~first),
            page.text(":").where(present),
            spaced.take(values - low).where(present),
            closing,
        )
        head = page.text(HEAD)
        ask = page.text(ASK)
        again = page.text(AGAIN)
        tail = cat(ask, spaced.take(key - low), again, spaced.take(key - low), page.text(IS))
        answer = [
            *after_space(page, numerals(value, NUMBERS[1])),
            (page.text(AND), False),
            (names.take(at), True),
        ]
        places = (1 + 8 * own + 3).squeeze(1)
        width = max(4, len(str(n)))
        references = torch.stack([numerals(value, width), numerals(at + 1, width)], 2).squeeze(1)
        return Story([head, entries, tail], [*answer, (page.text("]."), False)], places, references)

    def width(self) -> int | None:
        """For bytes, of prompts whose numbers are all of four digits, in dictionaries of four entries."""
        if not self.codec.is_bytes:
            return None
        n, entry = self.dictionaries, "1000: 1000"
        names = sum(len(str(i + 1)) for i in range(n)) + len(str(n))
        lines = n * len("\nDictionary [] {}" + ", ".join([entry] * 4)) - len(f", {entry}")  # the key's has three
        given = HEAD + ASK + "1000" + AGAIN + "1000" + IS + "1000" + AND + "]."
        return lines + names + len(given) + 2 - 1

    def read(self, text: str) -> list[str]:
        """The value of the key, and the number of its dictionary."""
        asked = re.search(r"The value of key (\d+) is ?$", text)
        found = asked and re.search(rf"Dictionary \[(\d+)\] {{(?:\d+: \d+, )*{asked[1]}: (\d+)", text)
        return [f" {found[2]}", found[1]] if found else []

    def splits(self) -> dict[str, Task]:
        """'train', the position from the first to the last, and twice the dictionaries."""
        n = self.dictionaries
        found: dict[str, Task] = {"train": self}
        for position in sorted({0, n // 4, n // 2, 3 * n // 4, n - 1}):
            found[f"position={position}"] = self.replace(position=position)
        found[f"dictionaries={2 * n}"] = self.replace(dictionaries=2 * n, position=None)
        return found
