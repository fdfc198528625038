"""The laws of named models, on small forms of them: few tokens, few symbols, float64, noise on all parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab import registry
from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec, build_model, preset
from contextlab.models.stack import ModelState
from contextlab.testing.law import Component, close, law, refused, require
from contextlab.testing.options import a_case, hold_to_options
from contextlab.testing.plain import plain_stack

SYMBOLS = 11
SIZES = {"input_size": SYMBOLS, "output_size": SYMBOLS, "read_in": "token"}
FEW = {"segment": 6, "chunk": 4, "block": 4, "top_k": 2}  # so small that 20 tokens fill more than one


def cases(entry: registry.Entry) -> Iterator[Component]:
    """A named model in each of its option cases, small; `beside` is its ModelSpec."""
    for options in entry.cases:
        yield of_spec(entry.name, small(entry, options), options, entry.factory)


def of_spec(
    name: str, spec: ModelSpec, options: Mapping[str, Any] | None = None, factory: Any = ModelSpec
) -> Component:
    """A component for any ModelSpec that reads tokens."""
    return Component("model", name, factory, options or {}, functools.partial(noisy, spec), spec)


def small(entry: registry.Entry, options: Mapping[str, Any]) -> ModelSpec:
    """The preset at width 16, with small segments; at width 64 where it has heads of a given size.

    A construction is of the sizes that its options give.
    """
    if hasattr(entry.factory, "construction"):
        return preset(entry.name, **options)
    own = {parameter.name for parameter in entry.parameters}
    few = {name: size for name, size in FEW.items() if name in own}
    for width in (16, 64):
        try:
            return preset(entry.name, **{**SIZES, "width": width, **few, **options})
        except InputError:
            if width == 64:
                raise
    raise AssertionError


def noisy(spec: ModelSpec) -> Model:
    """The model in float64, in evaluation mode, with noise on every parameter: parts that start at zero count too."""
    model = build_model(spec).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def tokens(length: int, batch: int = 2) -> Tensor:
    """[batch, length] int64."""
    return torch.randint(SYMBOLS, (batch, length), generator=torch.Generator().manual_seed(0))


def drawn(component: Component) -> bool:
    """Whether its weights are drawn. What a construction's do, its learner tells: `constructions.Construction`."""
    spec: ModelSpec = component.beside
    return spec.construction is None


def hold_to_bytes(model: Model, state: ModelState, length: int) -> None:
    """The size law of a model that has read two rows of `length` tokens in float64."""
    predicted = model.state_nbytes(length, batch=2, dtype=torch.float64)
    fits = state.nbytes <= predicted if model.state_varies else state.nbytes == predicted
    require(fits, f"state.nbytes is {state.nbytes}, state_nbytes says {predicted}")


@law(
    "model",
    "pieces",
    "Read in pieces, it answers as read whole; its state has the size of state_nbytes.",
    holds_for=drawn,
)
@torch.no_grad()
def pieces(component: Component) -> None:
    """20 tokens in five pieces."""
    model, x = component.build(), tokens(20)
    whole = model(x)
    outputs = []
    state: Any = None
    for piece in x.split([9, 1, 1, 6, 3], dim=1):
        y, state = model.read(piece, state)
        outputs.append(y)
    close(torch.cat(outputs, 1), whole, what="outputs in pieces")
    require(state.length == 20, f"state.length is {state.length} after 20")
    hold_to_bytes(model, state, 20)


@law(
    "model",
    "padding",
    "A padded row is answered as alone, and goes on as alone; gaps in a row are refused.",
    holds_for=drawn,
)
@torch.no_grad()
def padding(component: Component) -> None:
    """Five tokens of padding in one of two rows, at its left and at its right."""
    model, x = component.build(), tokens(12)
    alone, alone_state = model.read(x[:1, :7])
    expected, _ = model.read(x[:1, 7:9], alone_state)
    nothing, place = torch.zeros(1, 5, dtype=torch.int64), torch.arange(12)[None]
    for side, row, mask in (
        ("left", torch.cat([nothing, x[:1, :7]], 1), place >= torch.tensor([[5], [0]])),
        ("right", torch.cat([x[:1, :7], nothing], 1), place < torch.tensor([[7], [12]])),
    ):
        both = torch.cat([row, x[1:]])
        together, state = model.read(both, mask=mask)
        close(together[:1][mask[:1]], alone[0], what=f"outputs of the row padded on the {side}")
        close(model(both, mask)[:1][mask[:1]], alone[0], what=f"outputs without a state, padded on the {side}")
        after, _ = model.read(x[:, 7:9], state)
        close(after[:1], expected, what=f"outputs after the row padded on the {side}")
    wrong = "mask: row 0 has padding after tokens that were read before"
    refused(lambda: model.read(x, alone_state.select(torch.tensor([0, 0])), mask), wrong)
    gap = place != torch.tensor([[5], [20]])
    refused(lambda: model(x, gap), "mask: row 0 has padding between its tokens")


@law(
    "model",
    "description",
    "It computes what its spec says: loops, injection, sharing, residuals, norms.",
    holds_for=drawn,
)
@torch.no_grad()
def description(component: Component) -> None:
    """Against a plain loop over its blocks' mixers and MLPs (`contextlab.testing.plain`)."""
    model, x = component.build(), tokens(20)
    close(model(x), plain_stack(component.beside, model, x), what="outputs and those of the plain stack")


@law("model", "fresh loss", "Untrained, its cross-entropy is 0.9 to 1.4 log V, tied or not.", holds_for=drawn)
@torch.no_grad()
def fresh_loss(component: Component) -> None:
    """Of even targets among 64 symbols, drawn apart from the inputs."""
    spec: ModelSpec = component.beside
    if spec.read_in != "token" or spec.pool is not None:
        return
    inputs, targets = torch.randint(64, (2, 16, 32), generator=torch.Generator().manual_seed(0))
    for tied in (False, True):
        model = build_model(spec, input_size=64, output_size=64, tied=tied)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item() / math.log(64)
        require(0.9 <= loss <= 1.4, f"{'tied' if tied else 'not tied'}, it is {loss:.3g} log V")


@law("model", "options", "Every option counts: another value changes the spec, or is refused.", holds_for=a_case)
def options(component: Component) -> None:
    """What the spec says of the model is the law "description"."""
    entry = registry.lookup("model", component.name)
    hold_to_options(component, lambda options: iter([preset(entry.name, **options).model_dump()]))
