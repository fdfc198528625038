"""A model that starts from a trained one: what its tensors take over, by their names and shapes, and what is new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from contextlab.models.build import build_model
from contextlab.models.forms import formed, linear_layers, spec_of
from contextlab.models.outline import one_of_each, without_memory
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model
from contextlab.models.start_plan import (
    Init,
    Plan,
    attention_of,
    average_heads,
    block_of,
    block_places,
    is_end,
    make_plan,
    require_identity,
)


@dataclass(frozen=True)
class Started:
    """A model that starts from another.

    model: in training mode, on the source's device and in its dtype. plan: what became of each tensor.
    """

    model: Model
    plan: Plan

    @property
    def carried(self) -> Mapping[str, str]:
        """Name in the new model -> name in the source."""
        return self.plan.carried

    @property
    def new(self) -> tuple[str, ...]:
        """Names of tensors that the source does not give."""
        return self.plan.new

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the source's tensors that are not used."""
        return self.plan.dropped


def start_model(
    spec: ModelSpec,
    source: Model,
    init: Init = "fresh",
    *,
    blocks: Sequence[int | None] | None = None,
    seed: int = 0,
) -> Started:
    """Build a model that starts with the weights of another, which is left as it is.

    A tensor is carried over where the source has one of the same name and shape; whether it then means the same is for
    the caller to know (as many numbers are in 4 heads as in 8).

    spec: of the new model.
    init: what the rest starts from. "fresh": drawn as in any new model. "copied": blocks that the source does not have
        are copies of its blocks, in order and over again (stacking, 2405.15319). "zero": so they are, but their output
        projections are zero, so that each starts as the identity (block expansion, 2401.02415). "averaged": where an
        attention layer has fewer key and value heads, each is the mean of those whose queries it serves (2305.13245,
        section 2.1).
    blocks: for each block of the new model the number of the source's that it was, None for an added one; None: as many
        as both have are the same.
    seed: of what is drawn.

    Where the spec has linear forms and the source is dense, they are the nearest to the dense model that starts so.

    Raises InputError where nothing is carried over, and where `init` has nothing to do or is not defined.
    """
    if spec.linear and not source.spec.linear:
        dense = start_model(_dense(spec), source, init, blocks=blocks, seed=seed)
        plan = _with_forms(dense.plan, dense.model, spec)
        return Started(formed(dense.model, spec.linear), plan)
    model = build_model(spec, seed=seed)
    first = next(source.parameters())
    model = model.to(device=first.device, dtype=first.dtype)
    plan = make_plan(model, source, init, blocks)
    own, theirs = dict(model.state_dict()), source.state_dict()
    with torch.no_grad():
        for name, origin in plan.carried.items():
            tensor = theirs[origin]
            if name in plan.averaged:
                tensor = average_heads(tensor, attention_of(source, origin), attention_of(model, name))
            own[name].copy_(tensor)
        for name in plan.zeroed:
            own[name].zero_()
    if init == "zero":
        require_identity(model, [i for i, old in enumerate(block_places(model, source, blocks)) if old is None])
    return Started(model, plan)


def plan_start(
    spec: ModelSpec, source: ModelSpec, init: Init = "fresh", *, blocks: Sequence[int | None] | None = None
) -> Plan:
    """What `start_model` would do, from specs alone: no weights are read. Raises InputError as it does."""
    whole = spec
    if spec.linear and not source.linear:
        spec = _dense(spec)
    model = without_memory(spec) or build_model(spec)
    other = without_memory(source) or build_model(source)
    plan = make_plan(model, other, init, blocks)
    if init == "zero":  # whether a mixer adds something past its output projection, a layer of each kind tells
        small = build_model(one_of_each(spec))
        with torch.no_grad():
            for name, tensor in small.state_dict().items():
                if block_of(name) is not None and is_end(small, name):
                    tensor.zero_()
        pattern = spec.pattern()
        kinds = [pattern[i] for i, old in enumerate(block_places(model, other, blocks)) if old is None]
        require_identity(small, [i for i, layer in enumerate(small.spec.pattern()) if layer in kinds])
    return plan if spec is whole else _with_forms(plan, model, whole)


def _with_forms(plan: Plan, dense: Model, spec: ModelSpec) -> Plan:
    """The plan of a dense model, which says what of it is kept in the linear forms of `spec`."""
    found: dict[str, list[str]] = {}
    for name in linear_layers(dense, ends=True):
        form = spec_of(name, spec.linear)
        if form is not None and f"{name}.weight" in plan.carried:
            options = ",".join(f"{key}={value}" for key, value in form.options.items())
            found.setdefault(f"{form.form}:{options}" if options else form.form, []).append(f"{name}.weight")
    return replace(plan, forms={form: tuple(names) for form, names in found.items()})


def _dense(spec: ModelSpec) -> ModelSpec:
    return spec.model_copy(update={"linear": ()})
