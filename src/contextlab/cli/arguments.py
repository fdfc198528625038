"""Texts of the command line that commands read in the same way."""

from __future__ import annotations

import re

from contextlab.errors import InputError
from contextlab.memory import LARGEST_WHOLE


def read_lengths(text: str) -> list[int]:
    """256,1k,4k -> [256, 1024, 4096]."""
    found = []
    for part in text.split(","):
        word = part.strip().lower()
        number, factor = (word[:-1], 1024) if word.endswith("k") else (word, 1)
        if not (number.isascii() and number.isdigit()) or not number.strip("0"):
            raise InputError(f"--lengths: expected numbers of tokens such as 256,1k,4k, got {part.strip()[:80]!r}")
        if len(number) > 10 or int(number) * factor > LARGEST_WHOLE:
            raise InputError(f"--lengths: at most {LARGEST_WHOLE} tokens, got {part.strip()[:80]}")
        found.append(int(number) * factor)
    return sorted(set(found))


def largest_given(arguments: list[str]) -> str:
    """The largest size that the command line gives, as what to change when memory is short."""
    sizes: list[tuple[float, str]] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        key, _, value = argument.rpartition("=") if "=" in argument else (before, "", argument)
        if not ("=" in argument or before in ("--prompts", "--batch", "--lengths")):
            continue
        for number in re.findall(r"(?<![\w.])\d+(?:_\d+)*(?:\.\d+)?(?:e\+?\d+)?", value):
            if float(number) >= 1000:
                sizes.append((float(number), f"{key}{'=' if '=' in argument else ' '}{number}"))
    return f"; make something smaller: the largest size given is {max(sizes)[1]}" if sizes else ""
