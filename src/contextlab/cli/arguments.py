"""Texts of the command line that commands read in the same way."""

from __future__ import annotations

import re

from contextlab.errors import InputError
from contextlab.memory import LARGEST_WHOLE

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
"""Bytes of what stands before a B."""


def read_lengths(text: str) -> list[int]:
    """256,1k,4k -> [256, 1024, 4096]."""
    return sorted({read_length(part, "--lengths", "numbers of tokens such as 256,1k,4k") for part in text.split(",")})


def read_length(text: str, option: str, expected: str = "a number of tokens such as 512 or 16k") -> int:
    """16k -> 16384."""
    word = text.strip().lower()
    number, factor = (word[:-1], 1024) if word.endswith("k") else (word, 1)
    if not (number.isascii() and number.isdigit()) or not number.strip("0"):
        raise InputError(f"{option}: expected {expected}, got {text.strip()[:80]!r}")
    if len(number) > 10 or int(number) * factor > LARGEST_WHOLE:
        raise InputError(f"{option}: at most {LARGEST_WHOLE} tokens, got {text.strip()[:80]}")
    return int(number) * factor


def read_size(text: str, option: str) -> float:
    """64MB -> 64e6, 64MiB -> 2**26 bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmg]i?)?b\s*", text.lower())
    size = float(match[1]) * UNITS[match[2] or ""] if match else 0.0
    if size < 1 or size > LARGEST_WHOLE:
        raise InputError(f"{option}: expected a size such as 64MB, 64MiB or 1.5GB, got {text.strip()[:80]!r}")
    return size


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
