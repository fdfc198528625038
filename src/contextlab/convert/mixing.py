"""Models with other mixers in some of their layers: which layers can change, and the model that they are put in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from contextlab.convert.base import Change, module_nbytes
from contextlab.convert.calibration import Calibration
from contextlab.convert.students import mixer_of
from contextlab.convert.teacher import read_layers
from contextlab.errors import InputError
from contextlab.mixers.layers import is_plain
from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.models.build import build_model
from contextlab.models.changes import shortest_pattern
from contextlab.models.outline import without_memory
from contextlab.models.spec import LayerSpec, ModelSpec
from contextlab.models.stack import Model

RIDGE = 1e-2
"""Of least squares on few tokens, as a part of the inputs' mean square."""
LayerChoice = str | int | list[int]
"""Layers by number ("0,2,4" or [0, 2, 4]), "all", or "half": every second one, so that the last of each two stays."""

ATTENTION = ("attention", "sliding_window")
"""Mixers that are converted: those that hold their projections as `Attention` does."""


def attention_of(spec: ModelSpec, layer: int) -> AttentionMixer:
    """The attention of a layer, without memory. Raises InputError for one that is not made by itself."""
    outline = without_memory(spec)
    mixer = None if outline is None else outline.blocks[layer].mixer
    if not isinstance(mixer, AttentionMixer):
        raise InputError(f"layer {layer}: the model cannot be made without memory, so what it takes is not known")
    return mixer


def choose(spec: ModelSpec, layers: LayerChoice, kinds: Sequence[str] = ATTENTION) -> list[int]:
    """The numbers of the layers that are chosen, in order. Raises InputError where one cannot be converted.

    layers: see `LayerChoice`; "all" and "half" are of the layers that can be. kinds: mixers that can be.
    """
    for key, plain, how in (("loops", 1, "is looped"), ("atoms", None, "shares the atoms of its attention matrices")):
        if getattr(spec, key) != plain:
            raise InputError(f"layers: the model {how} ({key} {getattr(spec, key)}); expected one that does not")
    if spec.reads_whole:
        raise InputError("layers: the model pools or reads both ways; expected one that predicts at every token")
    if getattr(spec, "linear", ()):
        raise InputError("layers: the model's weights are stored in few bits already; convert it before they are")
    pattern, sources = spec.pattern(), spec.sources()
    can = [i for i, layer in enumerate(pattern) if not _obstacle(pattern, sources, i, kinds)]
    if isinstance(layers, str) and layers in ("all", "half"):
        if not can:
            raise InputError(f"layers: {_obstacle(pattern, sources, 0, kinds)}; no layer of the model can be converted")
        return can if layers == "all" else can[::2]
    found = _numbers(layers)
    for layer in found:
        if not 0 <= layer < spec.depth:
            raise InputError(f"layers: {layer} is out of range; the model has layers 0 to {spec.depth - 1}")
        if what := _obstacle(pattern, sources, layer, kinds):
            raise InputError(f"layers: {what}; those that can be converted are {_listed(can)}")
    return found


def require_in_reach(spec: ModelSpec, **tokens: int) -> None:
    """Refuse options, numbers of tokens, that are more than a model of learned positions reads. Raises InputError."""
    most = spec.max_length if spec.position == "learned" else None
    for name, count in tokens.items():
        if most is not None and count > most:
            raise InputError(f"{name} {count}: the model reads {most} tokens and no more; expected at most {most}")


def _obstacle(pattern: Sequence[LayerSpec], sources: Sequence[int], i: int, kinds: Sequence[str]) -> str:
    """Why a layer cannot be converted, in words; "" where it can."""
    layer = pattern[i]
    if layer.mixer not in kinds:
        return f"layer {i} is {layer.mixer!r}, not {' or '.join(map(repr, kinds))}"
    if layer.kv == "shared" or sources.count(i) > 1:
        return f"layer {i} shares its keys and values with another layer"
    if layer.share is not None or layer.with_input:
        return f"layer {i} is used several times, or reads the model's input"
    if layer.skip is not None:
        return f"layer {i} lets only some tokens through (skip); convert before `mod`"
    return ""


def _numbers(layers: LayerChoice) -> list[int]:
    parts = layers if isinstance(layers, list) else [each.strip() for each in str(layers).split(",")]
    try:
        found = [int(each) for each in parts]
    except (TypeError, ValueError):
        raise InputError(f"layers: expected all, half or numbers such as 0,2,4, got {str(layers)[:60]!r}") from None
    if len(set(found)) < len(found) or not found:
        raise InputError(f"layers: expected numbers, each once, got {str(layers)[:60]!r}")
    return sorted(found)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) if numbers else "none"


def with_layers(spec: ModelSpec, changes: Mapping[int, LayerSpec]) -> ModelSpec:
    """The spec with other layers at these numbers; its pattern is as short as it can be written."""
    pattern = [changes.get(i, layer) for i, layer in enumerate(spec.pattern())]
    shown = [layer.model_dump(exclude_unset=True) | {"mixer": layer.mixer} for layer in shortest_pattern(pattern)]
    return ModelSpec.parse({**spec.model_dump(), "layers": shown})


@torch.no_grad()
def rebuilt(model: Model, spec: ModelSpec, changed: Iterable[int], generator: torch.Generator) -> Model:
    """A model of the spec with all weights of `model` but those of the changed layers' mixers, in evaluation mode.

    These tensors are the model's own, which `set_apart` ends: to change them is to change it. The model stays as it
    is, and gives its dtype and device.
    generator: of the mixers that are new.
    """
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    first = next(model.parameters())
    new = build_model(spec, seed=seed).to(first.device, first.dtype)
    own = new.state_dict(keep_vars=True)
    skipped = tuple(f"blocks.{i}.mixer." for i in changed)
    for name, tensor in model.state_dict().items():
        if not name.startswith(skipped):
            own[name].data = tensor.to(own[name])
    return new.eval()


def changes_of(model: Model, new: Model, words: Mapping[int, str], data: Calibration | None) -> list[Change]:
    """A line for each layer whose mixer was changed, with the error of its outputs on the old model's inputs.

    words: layer -> what was done. data: None measures it on random vectors in place of the model's.
    """
    errors = output_errors(model, new, list(words), data)
    of = "outputs" if data is not None else "outputs of random inputs"
    found = []
    for i, did in words.items():
        before, after = (module_nbytes(mixer_of(each, i)) for each in (model, new))
        found.append(Change(f"blocks.{i}.mixer", did, errors[i], of, before, after))
    return found


@torch.no_grad()
def output_errors(model: Model, new: Model, layers: list[int], data: Calibration | None) -> dict[int, float]:
    """||y' - y|| / ||y|| of each layer's mixer, y' by the new model's mixer on the old one's inputs [B, T, D].

    data: None takes 2 x 64 standard normal vectors, the same for every layer.
    """
    lost, whole = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    for given, made in _seen(model, layers, data):
        for i, x, y in zip(layers, given, made, strict=True):
            other = mixer_of(new, i)(x, keep_state=False)[0]
            lost[i] += float((other - y).double().square().sum())
            whole[i] += float(y.double().square().sum())
    return {i: (lost[i] / whole[i]) ** 0.5 if whole[i] > 0 else float(lost[i] > 0) for i in layers}


@torch.no_grad()
def fit_outputs(model: Model, new: Model, layers: Sequence[int], data: Calibration) -> None:
    """Fit the output projections of new mixers, in place, to the old ones' outputs Y on the old model's inputs.

    With H what a projection W is given, W' = W + (Y - H W^T)^T H (H^T H + r I)^-1, r a part `RIDGE` of H^T H's mean
    diagonal: least squares that stay near W where the data say little. A mixer whose `out_proj` is no plain linear
    layer, or is not there, is left as it is.
    """
    projections = {i: each for i in layers if (each := _out_proj(mixer_of(new, i))) is not None}
    products: dict[int, tuple[Tensor, Tensor]] = {}
    for given, made in _seen(model, list(layers), data) if projections else ():
        for i, x, y in zip(layers, given, made, strict=True):
            if i not in projections:
                continue
            inputs: list[Tensor] = []
            hook = projections[i].register_forward_pre_hook(lambda _, each, kept=inputs: kept.append(each[0]))
            answer = mixer_of(new, i)(x, keep_state=False)[0]
            hook.remove()
            h, lost = inputs[0].double().flatten(0, 1), (y - answer).double().flatten(0, 1)
            found = h.T @ h, h.T @ lost
            square, cross = products.get(i, (torch.zeros_like(found[0]), torch.zeros_like(found[1])))
            products[i] = square + found[0], cross + found[1]
    for i, (square, cross) in products.items():
        ridge = RIDGE * square.diagonal().mean().clamp_min(1e-30)
        change = torch.linalg.solve(square + ridge * torch.eye(len(square)).to(square), cross)
        projections[i].weight.add_(change.T.to(projections[i].weight.dtype))


def _out_proj(mixer: nn.Module) -> nn.Linear | None:
    """A mixer's output projection, where it is a plain linear layer."""
    layer = getattr(mixer, "out_proj", None)
    return layer if isinstance(layer, nn.Linear) and is_plain(layer) else None


def _seen(
    model: Model, layers: list[int], data: Calibration | None
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """The inputs and outputs of the layers' mixers, batch by batch."""
    first = next(model.parameters())
    if data is None:
        x = torch.randn(2, 64, model.spec.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = x.to(first.device, first.dtype)
        yield [x] * len(layers), [mixer_of(model, i)(x, keep_state=False)[0] for i in layers]
        return
    for prompt, _ in data.batches:
        yield read_layers(model, prompt.to(first.device, first.dtype).inputs, layers)
