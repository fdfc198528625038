"""The ways to keep the context that are compared: policies as they are written or made, at each budget."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from contextlab.errors import InputError
from contextlab.evaluation.compress.prompts import DECODED, AnyModel, draw
from contextlab.policies import Budget, Policy, Served, parse_policy
from contextlab.prompt import Task
from contextlab.registry import entries
from contextlab.state import tensor_bytes

if TYPE_CHECKING:
    from contextlab.evaluation.compress.reading import Reading

FULL, OWN = "full", "own"
"""Budgets in the table: of the cache without a policy, and of policies that take none."""
WEIGHTS = "weights"
"""The kind of what is measured on a form of the weights."""
MOST_FITTED = 256
"""Prompts on which a policy is trained."""
Policies = Sequence[str | Policy] | Mapping[str, str | Policy]
"""Policies as they are written, or made; a mapping gives them names."""


@dataclass(frozen=True)
class Setting:
    """One way to keep the context.

    label: the policy as it was written or named, or a model's name. budget: as it was written, or FULL, or OWN.
    kind: "policy"; "weights" of a form of the weights, with a policy or without; "model" of another model.
    base: the policy, None for none. amount: the budget that it takes; None for that which it has.
    weights: how the weights were made smaller; "" for those of the model itself.
    """

    label: str
    budget: str
    model: AnyModel
    kind: str = "policy"
    base: Policy | None = None
    amount: Budget | None = None
    weights: str = ""

    @property
    def where(self) -> str:
        """The weights that are told in messages: " on rtn:bits=8"."""
        return f" on {self.weights}" if self.weights else ""

    def policy(self, rows: int) -> Policy | None:
        """The policy for so many sequences at once; a budget in bytes is one sequence's."""
        amount = self.amount
        if self.base is None or amount is None:
            return self.base
        each = dataclasses.replace(amount, amount=amount.amount * rows) if amount.kind == "bytes" else amount
        return self.base.with_budget(each)

    def served(self) -> list[Served]:
        """The layers that the policy serves, and by what; none without one.

        Raises InputError when it cannot serve the model.
        """
        policy = self.policy(1)
        if policy is None:
            return []
        device = next(self.model.parameters()).device  # it serves what it has seen; any text will do
        policy.prepare(self.model, torch.zeros(1, 2, dtype=torch.int64, device=device), 2)
        return policy.served(self.model)


def weight_bytes(model: AnyModel) -> int:
    """Bytes of what a saved model holds: parameters and buffers, what is shared once."""
    return sum({id(each): each.nbytes for each in model.state_dict(keep_vars=True).values()}.values())


class Refusals:
    """What cannot be measured: it is told in `left_out` where that is given, otherwise raised."""

    def __init__(self, left_out: list[str] | None) -> None:
        self.left_out = left_out

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Within it, an InputError is told, beginning with `what`."""
        try:
            yield
        except InputError as error:
            if self.left_out is None:
                raise
            self.left_out.append(f"{what}: {error}")


@contextlib.contextmanager
def naming(setting: Setting) -> Iterator[None]:
    """Errors say which policy they are about."""
    try:
        yield
    except InputError as error:
        if setting.base is None:
            raise
        raise InputError(f"policy {setting.label}: {error}") from None


def check_settings(policies: Policies, budgets: Sequence[str]) -> None:
    """Raises InputError where a policy or a budget cannot be read, or a policy takes a budget and there is none."""
    for each in budgets:
        Budget.of(each)
    for _ in _labelled(policies, budgets):
        pass


def takes_budgets(policies: Policies) -> bool:
    """Whether any of the policies, which `check_settings` let pass, takes a budget beside its own options."""
    made = [parse_policy(each) if isinstance(each, str) else each for each in policies]
    return any(each.takes_budget and not each.limits for each in made)


def _labelled(policies: Policies, budgets: Sequence[str]) -> Iterator[tuple[str, Policy, Sequence[str]]]:
    """Each policy's label, the policy, and the budgets that it takes; one that was made with its own keeps that."""
    named = policies.items() if isinstance(policies, Mapping) else ((None, each) for each in policies)
    made: set[str] = set()
    for name, each in named:
        if not isinstance(each, str | Policy):
            raise InputError(f"compress: expected policies or their names, got {each!r}")
        policy = parse_policy(each) if isinstance(each, str) else each
        label = name or (each if isinstance(each, str) else name_of(policy))
        if not isinstance(each, str):
            if label in made:
                raise InputError(f"compress: two policies are called {label!r}; give a mapping of names to policies")
            made.add(label)
        if not policy.takes_budget or policy.limits:
            yield label, policy, ()
            continue
        if isinstance(each, str) and not budgets:
            raise InputError(f"policy {label}: expected a budget, such as --budget 10%, 512tok or 64MB")
        yield label, policy, budgets


def name_of(policy: Policy) -> str:
    """The name under which a policy's class is registered, or that of the class."""
    known = {entry.factory: entry.name for entry in entries("policy")}
    return known.get(type(policy), type(policy).__name__)


def settings_of(
    model: AnyModel, policies: Policies, budgets: Sequence[str], fit: int, refusals: Refusals, weights: str = ""
) -> Iterator[Setting]:
    """One for each policy and budget, each tried on the model unless it is to be trained first.

    weights: of the model, see `Setting`.
    """
    check_settings(policies, budgets)
    for label, policy, amounts in _labelled(policies, budgets):
        own = ", ".join(map(str, policy.limits)) or OWN
        for amount in amounts or (None,):
            setting = Setting(
                label, amount or own, model, WEIGHTS if weights else "policy", policy,
                None if amount is None else Budget.of(amount), weights,
            )  # fmt: skip
            with refusals.of(f"{label} at {setting.budget}{setting.where}"):
                if not policy.untrained:
                    with naming(setting):
                        setting.served()
                elif not fit:
                    raise InputError(
                        f"policy {label}: it must be trained; --fit STEPS does so on prompts of each task, and "
                        "weights=FOLDER is for one that was trained with policy.fit"
                    )
                yield setting


def trained(
    settings: Iterable[Setting],
    task: Task,
    steps: int,
    seed: int,
    device: torch.device,
    tell: Callable[[str], None],
    decoded: int = DECODED,
) -> list[Setting]:
    """The settings with what must be trained of their policies trained on prompts of the task.

    Once for a policy, or for a policy and budget where it is trained for that.
    """
    done: dict[tuple[str, str, str], Policy] = {}
    found = []
    for setting in settings:
        if setting.base is not None and setting.base.untrained:
            key = setting.weights, setting.label, setting.budget if setting.base.fits_budget else ""
            if key not in done:
                tell(f"training {setting.label}, {steps} steps")
                drawn = draw(task, MOST_FITTED, seed + 1, device, decoded)
                done[key] = copy.deepcopy(setting.base.with_budget(setting.amount) if setting.amount else setting.base)
                answer = drawn.prompt.length - drawn.question
                with naming(setting):
                    done[key].train_on(setting.model, drawn.prompt.inputs, answer, steps=steps, seed=seed)
            setting = dataclasses.replace(setting, base=done[key])
        found.append(setting)
    return found


def check_model(setting: Setting, built: Mapping[tuple[str, int], Task]) -> None:
    """Refuse a model that cannot read the prompts."""
    for (text, n), task in built.items():
        size, longest = setting.model.spec.input_size or 0, getattr(setting.model.spec, "max_length", None)
        if setting.model.spec.read_in != "token" or task.input_size > size:
            raise InputError(f"{setting.label}: cannot read task {text!r}, which shows {task.input_size} token ids")
        if longest is not None and n > longest:
            raise InputError(f"{setting.label}: reads at most {longest} tokens, and --lengths has {n}")


def check_budget(setting: Setting, read: int, reading: Reading) -> None:
    """Refuse a part of the cache that the policy cannot keep to, for example because of what it protects.

    read: tokens that were read. reading: of one sequence.
    """
    dtype = next(setting.model.parameters()).dtype
    for bounds in ("held", "read"):
        cache = allowed = taken = 0.0
        for each in reading.layers:
            limit, layer = next(iter(each.policy.limits), None), each.layer
            if limit is not None and limit.kind == "ratio" and each.policy.bounds == bounds:
                size = tensor_bytes(read, layer.kv_heads, layer.key_dim + layer.value_dim, dtype=dtype)
                cache, allowed = cache + size, allowed + limit.amount * size
                taken += each.held_bytes if bounds == "held" else each.read_bytes
        if taken <= allowed:
            continue
        budget, least = f"{100 * allowed / cache:g}%", math.ceil(1000 * taken / cache) / 10
        if least > 100:
            raise InputError(
                f"policy {setting.label}: budget {budget} of {read} tokens is too small: "
                f"{'it must keep' if bounds == 'held' else 'a token reads'} {least:g}% of what the full cache of so "
                "few holds, so that nothing is saved at any budget; use longer prompts"
            )
        if bounds == "read":
            raise InputError(
                f"policy {setting.label}: budget {budget} of {read} tokens is too small: a token reads at least "
                f"{least:g}% of them here (the latest ones, and what the others are chosen by); raise the budget or "
                "use longer prompts"
            )
        raise InputError(
            f"policy {setting.label}: budget {budget} of {read} tokens is too small: it must keep at least "
            f"{least:g}% of them here; raise the budget, use longer prompts, or protect fewer tokens "
            f"({setting.label.partition('|')[0].partition(':')[0]}:window=4)"
        )
