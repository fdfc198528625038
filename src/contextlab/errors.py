"""The errors that a user can cause, each with a message of one line that says what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class ContextlabError(Exception):
    """Base of every error that contextlab raises on purpose; the command line prints it and exits with 2."""


class InputError(ContextlabError, ValueError):
    """What the user gave is wrong: the message says what was wrong, what was expected, the nearest choice."""


class ResourceError(ContextlabError, RuntimeError):
    """The machine lacks what was asked for (a GPU, disk space, a package)."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; "" where it has none."""
    return (str(error).splitlines() or [""])[0]


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None when nothing is alike."""
    choices = list(choices)
    folded = {choice.lower().replace("-", "_"): choice for choice in choices}
    hits = difflib.get_close_matches(name.lower().replace("-", "_"), list(folded), n=1, cutoff=0.5)
    return folded[hits[0]] if hits else None


def at_most(most: int, otherwise: str) -> str:
    """`at most 3`; where not even 1 is possible, what else to change."""
    return f"at most {most}" if most > 0 else otherwise


def check_whole(**options: tuple[object, int]) -> None:
    """Raises InputError unless each option, a value and its least, is a whole number not below it."""
    for name, (value, least) in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def unknown(what: str, name: object, choices: Iterable[str], of: str = "") -> str:
    """`unknown mixer 'atention'; did you mean 'attention'? (known: attention, gru, ...)`.

    of: what the names belong to: `unknown option 'hads' of mixer 'attention'; did you mean 'heads'? (...)`.
    """
    choices = sorted(choices)
    near = nearest(str(name), choices) or (choices[0] if of and len(choices) == 1 else None)
    shown = ", ".join(choices[:30]) + (", ..." if len(choices) > 30 else "")
    hint = f"; did you mean {near!r}?" if near else ""
    whose = f" of {of}" if of else ""
    return f"unknown {what} {str(name)[:80]!r}{whose}{hint} (known: {shown or 'none'})"


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` that is nearest to `wanted`, the smaller of two: what messages offer."""
    small = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
    return min((*small, *(size // n for n in small)), key=lambda n: (abs(n - wanted), n))
