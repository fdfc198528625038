"""What transformers calls things: asked of what is installed, never told by a version.

Releases 5.20 to 5.23 call a cache `past_key_values` or, in models without attention, `cache_params`; from 5.24 on it is
`cache`, in what models and attention modules take and in what they return. An argument of the wrong name is swallowed
by `**kwargs` there, without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

CACHES = ("cache", "past_key_values", "cache_params", "state")


def cache_name(names: Iterable[str]) -> str | None:
    """That of the names which is the cache's; None when none is."""
    known = set(names)
    return next((name for name in CACHES if name in known), None)


def cache_argument(function: Callable[..., Any]) -> str | None:
    """The argument by which a function of transformers takes a cache; None when it takes none."""
    parameters = inspect.signature(function).parameters
    # XLM's `cache` is a dictionary of its own, which no output hands on.
    return cache_name(name for name, each in parameters.items() if "dict[" not in str(each.annotation))
