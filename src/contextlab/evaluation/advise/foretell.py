"""The bytes of each way to spend memory, found without weights and without reading."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from contextlab.errors import InputError
from contextlab.evaluation.compress import FULL, OWN, WEIGHTS
from contextlab.models import Model, ModelSpec, weight_nbytes
from contextlab.models.outline import without_memory
from contextlab.policies import Budget, Policy, parse_policy
from contextlab.state import KVState, State, tensor_bytes


@dataclass(frozen=True)
class Form:
    """A model, a form of its weights, or another model that may take its place.

    label: "" for the model itself, else the method as it was written or the other model's name.
    kind: "policy" for the model itself, "weights" or "model". spec: what it is; make: gives it.
    made_of: what its quality depends on beside the model itself, such as what it is calibrated on: measurements count
        only for the same.
    """

    label: str
    kind: str
    spec: ModelSpec
    make: Callable[[], Model] = field(repr=False)
    made_of: str = ""


@dataclass(frozen=True)
class Way:
    """One way to spend memory.

    policy: as it was written, FULL for none. budget: as it was written, FULL, or OWN where a policy takes none.
    weight_bytes; state_bytes: of all sequences. exact: whether state_bytes is exact, else the most that it may be.
    left_out: why it is not measured; "" where it is.
    """

    form: Form
    policy: str
    budget: str
    weight_bytes: int = 0
    state_bytes: int = 0
    exact: bool = True
    left_out: str = ""

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weight_bytes + self.state_bytes

    @property
    def key(self) -> tuple[str, str, str, str]:
        """`weights`, `model`, `split` and `kind` in the table of measurements."""
        if self.form.kind == "model":
            return "", self.form.label, FULL, "model"
        return self.form.label, self.policy, self.budget, self.form.kind


def foretell(
    forms: Sequence[Form],
    policies: Sequence[str],
    budgets: Sequence[str],
    length: int,
    batch: int,
    dtype: torch.dtype = torch.float32,
) -> list[Way]:
    """Each form with the full cache and, but for other models, under each policy at each budget, largest first.

    Bytes of the weights are those of a saved model, bytes of the state those after `batch` sequences of `length` tokens
    were read. They are exact (`Model.state_nbytes`; under a policy from reading the model without memory), but for
    policies that look at the tokens themselves, which cannot be read so: then the budget bounds them (`Way.exact`).

    Ways that cannot be are left out with the reason. Raises InputError on policies and budgets that cannot be read.
    """
    parts, read = read_ways(policies, budgets)
    found = []
    for form in forms:
        weights = weight_nbytes(form.spec, dtype)
        plain = Way(form, FULL, FULL, weights)
        longest = form.spec.max_length
        if longest is not None and longest < length:
            found.append(dataclasses.replace(plain, left_out=f"reads at most {longest:,} tokens"))
            continue
        found.append(dataclasses.replace(plain, state_bytes=_outline(form.spec).state_nbytes(length, batch, dtype)))
        for text, policy in read if form.kind != "model" else ():
            found += _under(plain, text, policy, parts, length, batch, dtype)
    return found


def read_ways(policies: Sequence[str], budgets: Sequence[str]) -> tuple[list[str], list[tuple[str, Policy]]]:
    """The budgets, the largest first, and the policies with their texts. Raises InputError as `foretell` does."""
    parts = sorted((_part(each) for each in budgets), key=lambda each: -each[0])
    return [text for _, text in parts], [(text, parse_policy(text)) for text in policies]


def _part(text: str) -> tuple[float, str]:
    budget = Budget.of(text)
    if budget.kind != "ratio" or budget.everything:
        raise InputError(f"budget: expected a part of the full cache, such as 25%, got {text}; memory is what is asked")
    return budget.amount, text


def _under(
    plain: Way, text: str, policy: Policy, budgets: Sequence[str], length: int, batch: int, dtype: torch.dtype
) -> Iterator[Way]:
    """The ways of one form and policy."""
    takes = policy.takes_budget and not policy.limits
    for budget in budgets if takes else [", ".join(map(str, policy.limits)) or OWN]:
        own = policy.with_budget(budget) if takes else policy
        way = dataclasses.replace(plain, policy=text, budget=budget)
        try:
            if policy.untrained:
                raise InputError("it must be trained first; contextlab compress --fit STEPS measures it")
            each, exact = state_under(plain.form.spec, own, length, dtype)
            yield dataclasses.replace(way, state_bytes=batch * each, exact=exact)
        except InputError as error:
            yield dataclasses.replace(way, left_out=str(error))
            return


def state_under(spec: ModelSpec, policy: Policy, length: int, dtype: torch.dtype = torch.float32) -> tuple[int, bool]:
    """Bytes of the state of one sequence of so many tokens under a policy, and whether they are exact or the most.

    Raises InputError where the policy cannot serve the model, or nothing bounds it.
    """
    outline = copy.deepcopy(_outline(spec)).to(dtype).eval()
    tokens = torch.zeros(1, length, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            policy.prepare(outline, tokens, length)
            with policy.attach(outline):
                _, state = outline.read(tokens)
        return _nbytes(state), True
    except InputError:
        raise
    except (RuntimeError, TypeError) as error:
        if not _of_no_numbers(error):
            raise
        cache = length * _token_nbytes(policy, outline, dtype)
        parts = [each.amount for each in policy.limits if each.kind == "ratio"]
        if policy.bounds != "held" or not parts:
            raise InputError("its bytes are not known before it has read, and no budget bounds them") from None
        return _without_room(policy, outline, length, dtype) - cache + int(max(parts) * cache), False


def _of_no_numbers(error: Exception) -> bool:
    """Whether PyTorch says that numbers of a tensor without memory were asked for: there is no class for that."""
    told = str(error).lower()
    return "meta" in told or "data is not allocated" in told


def share_held(spec: ModelSpec, policy: Policy, length: int, dtype: torch.dtype = torch.float32) -> float:
    """Which part of the state of one sequence a policy holds; the full cache's room for further tokens left aside."""
    own, _ = state_under(spec, policy, length, dtype)
    return own / _without_room(policy, _outline(spec), length, dtype)


def _without_room(policy: Policy, outline: Model, length: int, dtype: torch.dtype) -> int:
    """Bytes of the state without the policy, and without the room that it makes for further tokens."""
    room = KVState.capacity(length) - length
    return outline.state_nbytes(length, 1, dtype) - room * _token_nbytes(policy, outline, dtype)


def _token_nbytes(policy: Policy, outline: Model, dtype: torch.dtype) -> int:
    """Bytes of one token in all the layers that a policy serves."""
    return sum(
        each.times * tensor_bytes(each.kv_heads, each.key_dim + each.value_dim, dtype=dtype)
        for each in policy.layers(outline)
    )


def _outline(spec: ModelSpec) -> Model:
    found = without_memory(spec)
    if found is None:
        raise InputError("advise: a layer of this model cannot be made without memory, so its bytes are not foretold")
    return found


def _nbytes(state: State) -> int:
    """`State.nbytes` of a state without memory, where all storages stand at address 0."""
    storages = [tensor.untyped_storage() for tensor in state.tensors()]
    return sum({each._cdata: each.nbytes() for each in storages}.values())


def itself(model: Model, made_of: str) -> Form:
    """The form that is the model itself."""
    return Form("", "policy", model.spec, lambda: model, made_of)


def other(label: str, model: Model, made_of: str) -> Form:
    """The form that is another model."""
    return Form(label, "model", model.spec, lambda: model, made_of)


def shrunk(label: str, spec: ModelSpec, make: Callable[[], Model], made_of: str) -> Form:
    """The form that is the model with its weights made smaller."""
    return Form(label, WEIGHTS, spec, make, made_of)
