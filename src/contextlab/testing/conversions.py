"""The laws of conversions. Each is put to small models of several mixers, in every option case.

The models have three blocks of width 16, read tokens, and are in float64 with noise on every parameter.
"""

from __future__ import annotations

import functools
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from contextlab import registry
from contextlab.convert import Calibration, Conversion, Converted
from contextlab.errors import InputError
from contextlab.models import LayerSpec, Model, ModelSpec, load_model, save_model, weight_nbytes
from contextlab.models.outline import without_memory
from contextlab.testing.law import Component, close, law, refused, require
from contextlab.testing.models import hold_to_bytes, noisy
from contextlab.testing.options import first_case, hold_to_options

MIXERS = ("attention", "gated_delta_net", "mamba2", "rg_lru")
"""What the models are made of: the first, and in the first option case one of the others, by the conversion's name."""
SYMBOLS = 12


class Tried(NamedTuple):
    """A conversion, what it was given, and what came of it. before: the model's tensors as they were."""

    conversion: Conversion
    model: Model
    before: dict[str, Tensor]
    data: Calibration
    converted: Converted


def cases(entry: registry.Entry) -> Iterator[Component]:
    """A registered conversion in each of its option cases; `beside` is the mixer of the model."""
    takes = entry.factory.takes or MIXERS  # type: ignore[attr-defined]
    for place, options in enumerate(entry.cases):
        others = MIXERS[1:]
        for mixer in (MIXERS[0], others[crc32(entry.name.encode()) % len(others)])[: 2 if place == 0 else 1]:
            if mixer not in takes:
                continue
            tried = functools.partial(_tried, entry, options, mixer)
            yield Component("conversion", entry.name, entry.factory, options, functools.cache(tried), mixer)


def _tried(entry: registry.Entry, options: Mapping[str, Any], mixer: str) -> Tried:
    conversion = build(entry, options, mixer)
    model, data = small_model(mixer), calibration()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Tried(conversion, model, before, data, conversion(model, data))


def build(entry: registry.Entry, options: Mapping[str, Any], mixer: str) -> Conversion:
    """The conversion with these options, and with other models of the mixer where it needs any."""
    factory: Any = entry.factory
    more: dict[str, Any] = {"others": (small_model(mixer, seed=1),)} if "models" in factory.needs else {}
    if getattr(factory, "wants_base", False):
        more["base"] = small_model(mixer, seed=2)
    built: Conversion = entry.build(**more, **options)
    return built


def small_model(mixer: str = MIXERS[0], seed: int = 0, depth: int = 3) -> Model:
    """A model of alike blocks, in float64."""
    sizes = {"width": 16, "depth": depth, "heads": 2, "mlp_ratio": 2, "input_size": SYMBOLS, "output_size": SYMBOLS}
    model = noisy(ModelSpec.parse({**sizes, "layers": [mixer], "read_in": "token"}))
    if seed:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def tokens(length: int = 20, batch: int = 2, seed: int = 0) -> Tensor:
    """[batch, length] int64."""
    return torch.randint(SYMBOLS, (batch, length), generator=torch.Generator().manual_seed(seed))


def calibration() -> Calibration:
    """Two batches of random tokens."""
    return Calibration.of_tokens(tokens(length=25, batch=4, seed=1), batch=2)


def _described(model: Model) -> list[list[Any]]:
    """The layers and the rest of the spec; and of each tensor that is saved the block's part, size and kind."""
    rest = [(name, value) for name, value in model.spec.model_dump().items() if name != "layers"]
    tensors = []
    for name, each in model.state_dict().items():
        dtype = torch.float64 if each.is_floating_point() else each.dtype  # an outline is of float32
        tensors.append((name, tuple(each.shape), dtype))
    return [[*model.spec.pattern(), *rest], tensors]


def _without(part: Any, names: tuple[str, ...]) -> Any:
    """A layer without the options of these names; anything else as it is."""
    if not isinstance(part, LayerSpec):
        return part
    return part.model_copy(update={"options": {k: v for k, v in part.options.items() if k not in names}})


def _unplaced(described: list[list[Any]]) -> list[list[Any]]:
    """The same without the numbers of blocks, in an order of its own."""
    return [sorted(re.sub(r"blocks\.\d+", "blocks", repr(each)) for each in part) for part in described]


@law("conversion", "plan", "What plan foretells without weights comes out: the spec, and each tensor's size.")
def plan(component: Component) -> None:
    """Of a model whose blocks are alike."""
    tried: Tried = component.build()
    planned, made = tried.conversion.plan(tried.model.spec), tried.converted.model
    outline = without_memory(planned)
    require(outline is not None, "what is planned cannot be made")
    assert outline is not None
    got, foretold = _described(made), _described(outline)
    for part in (got, foretold):
        part[0] = [_without(each, tried.conversion.by_data) for each in part[0]]
    if tried.conversion.places_by_data:  # what stands where is not foretold
        got, foretold = _unplaced(got), _unplaced(foretold)
    require(got[0] == foretold[0], f"the spec is {made.spec!r}, plan said {planned!r}")
    require(got[1] == foretold[1], "tensors have other names or sizes than a model of the planned spec")
    size = weight_nbytes(planned, torch.float64)
    require(made.weight_nbytes == size, f"its weights take {made.weight_nbytes} bytes, foretold are {size}")


@law(
    "conversion", "old model", "The model that was given is as it was, bit for bit; the new one has weights of its own."
)
def old_model(component: Component) -> None:
    """Its tensors, and where they are."""
    tried: Tried = component.build()
    after = tried.model.state_dict()
    same = after.keys() == tried.before.keys() and all(torch.equal(after[n], t) for n, t in tried.before.items())
    require(same, "the model that was given has changed")
    places = {each.data_ptr() for each in after.values() if each.numel()}
    shared = [n for n, each in tried.converted.model.state_dict().items() if each.numel() and each.data_ptr() in places]
    require(not shared, f"the new model shares {', '.join(shared[:3])} with the old one")


@law("conversion", "lines", "What was done is told of parts that the model has, with finite errors.")
def lines(component: Component) -> None:
    """At least one."""
    tried: Tried = component.build()
    known = {name for name, _ in tried.model.named_modules()} | {name for name, _ in tried.model.named_parameters()}
    require(tried.converted.lines, "nothing is told")
    for line in tried.converted.lines:
        require(line.layer in known, f"{line.layer!r} is no part of the model")
        require(math.isfinite(line.error), f"the error of {line.layer} is {line.error}")


def changes_nothing(component: Component) -> bool:
    """Whether it has options with which the model stays as it is."""
    return component.factory.nothing is not None and first_case(component)  # type: ignore[attr-defined]


@law(
    "conversion",
    "nothing to do",
    "With the options that change nothing, it answers as before.",
    holds_for=changes_nothing,
)
@torch.no_grad()
def nothing_to_do(component: Component) -> None:
    """To 1e-6 of the largest answer."""
    entry = registry.lookup("conversion", component.name)
    model = small_model(component.beside)
    conversion = build(entry, component.factory.nothing, component.beside)  # type: ignore[attr-defined]
    close(conversion(model, calibration()).model(tokens()), model(tokens()), 1e-6, "answers")


@law("conversion", "same seed", "Converted again, it is the same, bit for bit.")
def same_seed(component: Component) -> None:
    """From a model built again."""
    first: Tried = component.build()
    again = first.conversion(small_model(component.beside), first.data)
    a, b = first.converted.model.state_dict(), again.model.state_dict()
    require(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), "weights differ")
    require(first.converted.lines == again.lines, "what is told differs")


@law("conversion", "saved", "What comes out can be saved and loaded, and then answers the same.")
@torch.no_grad()
def saved(component: Component) -> None:
    """Bit for bit."""
    made = component.build().converted.model
    with tempfile.TemporaryDirectory() as folder:
        save_model(made, folder)
        loaded = load_model(folder)
    require(loaded.spec == made.spec, "it is loaded with another spec")
    require(torch.equal(loaded.eval()(tokens()), made(tokens())), "loaded, it answers otherwise")


@law("conversion", "reads on", "What comes out keeps the laws of models: pieces, honest size, causality.")
@torch.no_grad()
def reads_on(component: Component) -> None:
    """20 tokens in four pieces, and other tokens after the twelfth."""
    model, x = component.build().converted.model, tokens()
    whole = model(x)
    outputs = []
    state: Any = None
    for piece in x.split([9, 1, 7, 3], 1):
        y, state = model.read(piece, state)
        outputs.append(y)
    close(torch.cat(outputs, 1), whole, 1e-9, "outputs in pieces")
    hold_to_bytes(model, state, 20)
    other = torch.cat((x[:, :12], tokens(8, seed=5)), 1)
    close(model(other)[:, :12], whole[:, :12], 1e-9, "outputs before other tokens")


def alone_on_the_first_mixer(component: Component) -> bool:
    """In its first option case, where it needs no other models, which would have to be shrunk alike."""
    return first_case(component) and component.beside == MIXERS[0] and "models" not in component.factory.needs  # type: ignore[attr-defined]


@law(
    "conversion",
    "after another",
    "What cannot be done after another conversion, `plan` refuses: before the other has done its work.",
    holds_for=alone_on_the_first_mixer,
)
def after_another(component: Component) -> None:
    """After all linear layers, or those of MLPs alone, have become whole numbers."""
    entry = registry.lookup("conversion", component.name)
    conversion = build(entry, component.options, component.beside)
    for layers in ("*", "*.mlp.*"):
        rounded = registry.lookup("conversion", "rtn").build(group=8, layers=layers)(small_model()).model
        try:
            conversion.plan(rounded.spec)
        except InputError:
            continue
        try:
            conversion(rounded, calibration())
        except InputError as error:
            require(False, f"after rtn:layers={layers} plan allows what is then refused: {error}")


def calibrated(component: Component) -> bool:
    """Whether it needs data."""
    return "calibration" in component.factory.needs and first_case(component)  # type: ignore[attr-defined]


@law("conversion", "needs data", "Without the data that it needs it is refused in one line.", holds_for=calibrated)
def needs_data(component: Component) -> None:
    """The line names it."""
    tried: Tried = component.build()
    refused(lambda: tried.conversion(tried.model), f"{component.name}: needs data")


def on_the_first_mixer(component: Component) -> bool:
    """One of the tries of each option case."""
    return bool(component.beside == MIXERS[0])


@law(
    "conversion",
    "options",
    "Every option counts: another value changes what comes out, or is refused.",
    holds_for=on_the_first_mixer,
)
def options(component: Component) -> None:
    """Of the spec and the weights."""
    entry = registry.lookup("conversion", component.name)
    marks: Callable[[Mapping[str, Any]], Iterator[Any]] = functools.partial(_marks, entry, component.beside)
    hold_to_options(component, marks, "others", "base")


def _marks(entry: registry.Entry, mixer: str, options: Mapping[str, Any]) -> Iterator[Any]:
    """What a conversion's options may change."""
    made = build(entry, options, mixer)(small_model(mixer), calibration()).model
    yield made.spec.model_dump()
    yield {name: each.detach() for name, each in made.state_dict().items()}
