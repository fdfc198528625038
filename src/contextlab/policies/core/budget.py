"""How much context a policy may keep: tokens, a part of the full cache, or bytes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from contextlab.errors import InputError
from contextlab.spec import describe

OPEN = 2**31 - 1  # more tokens than any sequence has
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Budget:
    """One limit of what is kept, for the whole model; a policy divides it between layers.

    kind: "tokens" (in each layer, on average over layers), "ratio" (of the bytes of the full cache at the length read
        so far), or "bytes" (of the whole state, all layers and rows).
    amount: tokens, a part in (0, 1], or bytes.
    """

    kind: Literal["tokens", "ratio", "bytes"]
    amount: float

    @classmethod
    def of(cls, given: Budget | str | float | None) -> Budget:
        """A budget from what people write: "512tok", "10%", 0.1, "64MB" (10^6), "64MiB"; None keeps everything.

        Raises InputError when it is none of these, zero, negative or above 100%.
        """
        if isinstance(given, Budget):
            return given
        if given is None:
            return cls(kind="ratio", amount=1.0)
        forms = "512tok, 10%, 0.1 or 64MB"
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            raise InputError(f"budget: expected {forms}, got {describe(given)}")
        match = re.fullmatch(r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*(%|tok(?:ens?)?|(?:[kmg]i?)?b)?\s*", str(given).lower())
        try:
            amount = float(match[1]) if match else math.nan
        except ValueError:
            amount = math.nan
        if match is None or not math.isfinite(amount):
            raise InputError(f"budget: expected {forms}, got {given!r}")
        unit = match[2] or ""
        if amount <= 0:
            raise InputError(f"budget: {given} keeps nothing; it must be above 0, for example 10%")
        if unit in ("", "%"):
            part = amount / 100 if unit == "%" else amount
            if part > 1:
                hint = f"; did you mean {amount:g}tok or {amount:g}%?" if not unit else "; 100% keeps everything"
                raise InputError(f"budget: {given} is more than the full cache{hint}")
            return cls(kind="ratio", amount=part)
        if unit.startswith("tok"):
            if amount != int(amount):
                raise InputError(f"budget: expected a whole number of tokens, got {given}")
            return cls(kind="tokens", amount=amount)
        return cls(kind="bytes", amount=amount * UNITS[unit[:-1]])

    @property
    def everything(self) -> bool:
        """Whether it limits nothing."""
        return self.kind == "ratio" and self.amount == 1

    def __str__(self) -> str:
        if self.kind == "ratio":
            return f"{100 * self.amount:g}%"
        if self.kind == "tokens":
            return f"{self.amount:g}tok"
        for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
            if self.amount >= size:
                return f"{self.amount / size:g}{unit}"
        return f"{self.amount:g}B"


Amount = Budget | str | float | None  # what `Budget.of` reads
