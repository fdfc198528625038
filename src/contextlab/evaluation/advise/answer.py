"""`advise`: which ways to spend memory fit, and what those that fit keep of the model's quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from contextlab.errors import InputError
from contextlab.evaluation.advise.foretell import Form, Way, foretell, itself, share_held
from contextlab.evaluation.advise.store import Store
from contextlab.evaluation.compress import FULL, Refusals, Setting, build_prompts, measure
from contextlab.evaluation.compress.measuring import tokenizer_name
from contextlab.models import Model
from contextlab.models.digest import fingerprint
from contextlab.policies import Budget, parse_policy
from contextlab.words import bytes_in_words

POLICIES = ("quantize:bits=4", "keydiff:window=8", "keydiff:window=8|quantize:bits=4")
"""Policies that are tried where none are given: few bits, few tokens, and both; none needs training."""
BUDGETS = ("50%", "25%", "10%", "5%")
SECONDS = 600
"""Measuring should take no longer than about this, else prompts are shorter."""
RATE = {"cpu": 2e10, "cuda": 2e13}
"""FLOPs a second that are counted on, by the kind of device: only an order of magnitude."""
SHORTEST = 128
SAVES = 0.97
"""A policy that holds at least this part of the full cache's bytes saves no memory."""


@dataclass(frozen=True)
class Advice:
    """What was asked, which ways there are, and what was measured.

    memory: bytes. length, batch: tokens of a sequence, and sequences at once. at: tokens of the prompts on which
    quality was measured. ways: all, each with its foretold bytes; those without `left_out` fit. results: the table of
    `compress` for them at `at` tokens, with what was measured of others before. measured: how many ways were measured
    for this question; the others were read.
    """

    name: str
    memory: float
    length: int
    batch: int
    at: int
    ways: list[Way]
    results: pd.DataFrame = field(repr=False)
    measured: int = 0

    @property
    def fitting(self) -> list[Way]:
        """The ways that fit and were measured."""
        return [way for way in self.ways if not way.left_out]


def advise(
    model: Model,
    memory: float,
    length: int,
    batch: int = 1,
    *,
    forms: Sequence[Form] = (),
    policies: Sequence[str] = POLICIES,
    budgets: Sequence[str] = BUDGETS,
    tasks: Sequence[str] = ("needle", "text"),
    at: int | None = None,
    prompts: int = 32,
    together: int = 16,
    seed: int = 0,
    name: str = "model",
    tokenizer: Any = None,
    folder: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Advice:
    """Foretell the bytes of every way to spend memory, and measure what those that fit keep of the model's quality.

    memory: bytes for the weights and the states of `batch` sequences of `length` tokens.
    forms: of the weights, and other models, beside the model itself (`foretell.shrunk`, `foretell.other`).
    policies, budgets: see `foretell`. Of each policy and form the largest budget that fits is measured, and none where
        the full cache fits.
    tasks, prompts, seed: see `compress`. together: prompts at once.
    at: tokens of the prompts; None for `length`, or as many as can be read in about ten minutes by the FLOPs.
    folder: where measurements are kept, and read from: those of the same model, prompts and length are not repeated.

    Raises InputError, before anything is read, on what does not fit together, and where the folder holds measurements
    of another model or other prompts.
    """
    if not memory > 0 or length < 1 or batch < 1:
        raise InputError(f"advise: expected memory, length and batch above 0, got {memory}, {length} and {batch}")
    tell = progress or (lambda text: None)
    dtype = next(model.parameters()).dtype
    every = [itself(model, fingerprint(model)), *forms]
    wanted = list(tasks)
    _check_tasks(wanted, [at] if at else [length, SHORTEST], model, tokenizer)
    labels = [form.label for form in every]
    if twice := [label for i, label in enumerate(labels) if label in labels[:i]]:
        raise InputError(f"advise: two candidates are called {twice[0]!r}; give folders with different names")
    tell("foretelling bytes")
    ways = _chosen(foretell(every, policies, budgets, length, batch, dtype), memory)
    holds_for = {
        "another model": every[0].made_of,
        "other prompts": f"{prompts} of seed {seed}",
        "another tokenizer": tokenizer_name(tokenizer),
    }
    store = Store.opened(None if folder is None else Path(folder), holds_for, {f.label: f.made_of for f in every[1:]})
    fitting = [way for way in ways if not way.left_out]
    device = next(model.parameters()).device
    at = at or _length_to_read(model, length, prompts * (1 + len(fitting)), device, store.lengths())
    if at < length:
        told = f"on prompts of {at:,} tokens it keeps all, so that these would tell nothing of it"
        ways = [dataclasses.replace(way, left_out=told) if _keeps_all(way, at, length, dtype) else way for way in ways]
        fitting = [way for way in ways if not way.left_out]
    fresh = [way for way in fitting if not store.has(way.key, wanted, at)]
    todo = [way for way in fresh if way.key != _ITSELF]
    lines: list[str] = []
    if fitting and (todo or not store.has(_ITSELF, wanted, at)):
        for task in wanted:  # what is wrong with one is said before anything is made
            build_prompts(task, at, model, tokenizer)
        settings = [Setting(FULL, FULL, model)]
        made: dict[str, Model] = {"": model}
        for way in todo:
            if way.form.label not in made:
                tell(f"making {way.form.label}")
                made[way.form.label] = way.form.make()
            settings.append(_setting(way, made[way.form.label]))
        store.add(
            measure(
                settings, wanted, [at], prompts=prompts, batch=together, seed=seed, name=name, tokenizer=tokenizer,
                refusals=Refusals(lines), progress=progress, sequences=batch,
            )
        )  # fmt: skip
    measured = sum(store.has(way.key, wanted, at) for way in fresh)
    ways = [
        way if way.left_out or store.has(way.key, wanted, at) else dataclasses.replace(way, left_out=_why(way, lines))
        for way in ways
    ]
    rows = store.rows[(store.rows["length"] == at) & store.rows["task"].isin(wanted)]
    return Advice(name, memory, length, batch, at, ways, rows, measured)


_ITSELF = ("", FULL, FULL, "policy")


def _check_tasks(tasks: Sequence[str], lengths: Sequence[int], model: Model, tokenizer: Any) -> None:
    """Raises InputError where a task can be built at none of the lengths: before bytes are foretold."""
    for task in tasks:
        faults: list[InputError] = []
        for each in lengths:
            try:
                build_prompts(task, each, model, tokenizer)
                break
            except InputError as error:
                faults.append(error)
        else:
            raise faults[0]


def _chosen(ways: Sequence[Way], memory: float) -> list[Way]:
    """The ways, with the reason of each that is not to be measured."""
    found: list[Way] = []
    whole: set[str] = set()
    largest: dict[tuple[str, str], str] = {}
    for way in ways:
        form, line = way.form.label, (way.form.label, way.policy)
        reason = way.left_out
        if not reason and way.total > memory:
            reason = f"{bytes_in_words(way.total - memory)} too large"
        if not reason and way.policy != FULL:
            reason = "the full cache fits" if form in whole else f"{largest[line]} fits" if line in largest else ""
        if not reason:
            largest[line] = way.budget
            whole |= {form} if way.policy == FULL else set()
        found.append(dataclasses.replace(way, left_out=reason))
    return found


def _setting(way: Way, model: Model) -> Setting:
    if way.policy == FULL:
        label = way.form.label if way.form.kind == "model" else FULL
        return Setting(label, FULL, model, way.form.kind, weights=way.key[0])
    policy = parse_policy(way.policy)
    amount = Budget.of(way.budget) if policy.takes_budget and not policy.limits else None
    return Setting(way.policy, way.budget, model, way.form.kind, policy, amount, way.key[0])


def _keeps_all(way: Way, at: int, length: int, dtype: torch.dtype) -> bool:
    """Whether a policy that will save memory saves none on shorter prompts: a window, say, holds all of them."""
    if way.left_out or way.policy == FULL:
        return False
    policy = parse_policy(way.policy)
    if policy.takes_budget and not policy.limits:
        policy = policy.with_budget(way.budget)
    held = [share_held(way.form.spec, policy, each, dtype) for each in (at, length)]
    return held[0] >= SAVES > held[1]


def _why(way: Way, lines: Sequence[str]) -> str:
    """Why it could not be measured, of the lines that tell what was left out."""
    weights, policy, budget, _ = way.key
    start = f"{policy} at {budget}{f' on {weights}' if weights else ''}, "
    return next((line.removeprefix(start) for line in lines if line.startswith(start)), "it could not be measured")


def _length_to_read(model: Model, length: int, readings: int, device: torch.device, known: Sequence[int]) -> int:
    """The length asked for, or the largest of its halves that can be read so often in about `SECONDS`.

    Where something longer was measured before, that.
    """
    most = min(length, model.spec.max_length or length)
    found = most
    while found > SHORTEST and readings * model.flops(found) > SECONDS * RATE.get(device.type, RATE["cpu"]):
        found = max(SHORTEST, found // 2)
    return max([found, *(each for each in known if each <= most)])
