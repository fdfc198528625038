"""The stack written apart from `contextlab.models`, plainly: only what mixers and MLPs compute is taken from there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from contextlab import registry
from contextlab.mixers.static.none import NoMixer
from contextlab.models import ModelSpec
from contextlab.testing.law import require


def plain_stack(spec: ModelSpec, model: Any, inputs: Tensor) -> Tensor:
    """What a model of this spec with these parameters predicts.

    inputs: [B, T] int64, or [B, T, input_size] float. Returns [B, T, output_size].
    Raises AssertionError where the blocks are not those of the spec.
    """
    require(spec.exit is None, "the plain stack has no early exits")
    embedded = _embed(spec, model, inputs)
    layers = [spec.layers[i % len(spec.layers)] for i in range(spec.depth)]
    _check_parts(spec, layers, model)
    tokens = inputs if spec.read_in == "token" else None
    x = embedded
    for loop in range(spec.loops):
        if loop > 0 and spec.input_injection:
            x = x + embedded
        made: Any = None  # the state of the last layer that made keys of its own
        for layer, block in zip(layers, model.blocks, strict=True):
            if layer.with_input:
                x = x + _with_input(spec, block, torch.cat([x, embedded], -1), embedded, tokens)
                continue
            if layer.skip is not None:
                x = _some_through(spec, layer, block, x, tokens)
                continue
            x, state = _through(spec, layer, block, x, made, tokens)
            if layer.kv == "own" and layer.mixer == "attention":
                made = state
    x = _norm(spec, model.read_out_norm, x)
    if spec.tied:
        tied: Tensor = x @ model.read_in.weight.T
        return tied
    if spec.pool is not None:
        answer: Tensor = model.read_out(x, None)
        return answer
    return _linear(model.read_out, x)


def _through(
    spec: ModelSpec, layer: Any, block: Any, x: Tensor, made: Any, tokens: Tensor | None
) -> tuple[Tensor, Any]:
    """The stream after a block [B, T, D], and its mixer's state."""
    silent = layer.mixer == "none" and spec.block != "parallel"
    normed = x if silent else _norm(spec, block.mixer_norm, x)
    y, state = block.mixer(normed, made if layer.kv == "shared" else None, None, layer.kv == "own", tokens)
    if (layer.mlp or spec.mlp).kind == "none":
        return _join(spec, block.mixer_residual, x, y), state
    if spec.block == "parallel":
        return _join(spec, block.mixer_residual, x, y + block.mlp(normed)), state
    x = _join(spec, block.mixer_residual, x, y)
    return _join(spec, block.mlp_residual, x, block.mlp(_norm(spec, block.mlp_norm, x))), state


def _some_through(spec: ModelSpec, layer: Any, block: Any, x: Tensor, tokens: Tensor | None) -> Tensor:
    """The stream after a block that tokens may skip [B, T, D]: row by row, token by token."""
    out, router, skip = x.clone(), block.router, layer.skip
    for row in range(len(x)):
        normed = x[row] / (x[row].square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
        through: list[int] = []
        for place in range(x.shape[1]):
            read = place + 1
            wanted = skip.share == 1 or float((normed[place] * router.choice).sum() + router.bias) > 0
            if wanted and len(through) < min(read, math.ceil(skip.share * read - 1e-9) + skip.ahead):
                through.append(place)
        if through:
            ids = None if tokens is None else tokens[row : row + 1, through]
            y, _ = _through(spec, layer, block, x[row : row + 1, through], None, ids)
            weight = 1 + (normed[through] * router.weight).sum(-1, keepdim=True)
            out[row, through] = x[row, through] + weight * (y[0] - x[row, through])
    return out


def _embed(spec: ModelSpec, model: Any, inputs: Tensor) -> Tensor:
    """[B, T, D]: the read-in and, where the spec says so, absolute positions."""
    x: Tensor = model.read_in.weight[inputs] if spec.read_in == "token" else _linear(model.read_in, inputs)
    places = torch.arange(inputs.shape[1])
    if spec.position == "learned":
        x = x + model.positions.weight[places]
    elif spec.position == "sinusoidal":
        waves = torch.zeros(inputs.shape[1], spec.width, dtype=torch.float64)
        for d in range(spec.width):
            angle = places.double() / 10000.0 ** ((d - d % 2) / spec.width)
            waves[:, d] = angle.sin() if d % 2 == 0 else angle.cos()
        x = x + waves.to(x.dtype)
    return x


def _with_input(spec: ModelSpec, block: Any, both: Tensor, embedded: Tensor, tokens: Tensor | None) -> Tensor:
    """L MLP(norm(mixer(norm([x, input])))), [B, T, D]. both: [B, T, 2 D]."""
    body = block.body
    y, _ = body.mixer(_norm(spec, body.mixer_norm, both), None, None, False, tokens)
    y = _linear(body.narrow, y)
    if body.mlp is not None:
        y = body.mlp(_norm(spec, body.mlp_norm, y))
    return _linear(block.out_proj, y)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """[..., outputs]."""
    y: Tensor = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def _norm(spec: ModelSpec, module: Any, x: Tensor) -> Tensor:
    """Of the shape of x [..., D]."""
    if spec.norm == "none":
        return x
    if spec.norm == "rms":
        eps = torch.finfo(x.dtype).eps if spec.norm_eps is None else spec.norm_eps
        scaled: Tensor = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight
        return scaled
    eps = 1e-5 if spec.norm_eps is None else spec.norm_eps
    centred = x - x.mean(-1, keepdim=True)
    moved: Tensor = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight + module.bias
    return moved


def _join(spec: ModelSpec, residual: Any, x: Tensor, fx: Tensor) -> Tensor:
    """The residual connection of x and f(x), both [B, T, D]."""
    if spec.residual == "none":
        return fx
    if spec.residual in ("laurel_lr", "laurel"):
        x = x + x @ residual.down.weight.T @ residual.up.weight.T
    if spec.residual in ("laurel_rw", "laurel"):
        a, b = residual.weights.exp() * 2 / residual.weights.exp().sum()
        return a * fx + b * x
    return fx + x


def _check_parts(spec: ModelSpec, layers: list[Any], model: Any) -> None:
    """The blocks' mixers and MLPs are those that the spec names, and shared where it says so."""
    require(len(model.blocks) == spec.depth, f"{len(model.blocks)} blocks, expected {spec.depth}")
    if spec.pool is None and spec.read_in == "token":
        tied = model.read_out.weight is model.read_in.weight
        require(tied == spec.tied, f"the read-out is {'' if tied else 'not '}tied to the embedding")
    shared: dict[str, Any] = {}
    seen: set[int] = set()
    for layer, block in zip(layers, model.blocks, strict=True):
        mixer: Any = block.mixer
        wanted: Any = NoMixer if layer.mixer == "none" else registry.lookup("mixer", layer.mixer).factory
        if layer.kv == "own":
            require(type(mixer) is wanted, f"a mixer is a {type(mixer).__name__}, expected {layer.mixer}")
        require(mixer.width == spec.width * (1 + layer.with_input), f"a mixer is {mixer.width} wide")
        mlp: Any = (block.body if layer.with_input else block).mlp
        kind = (layer.mlp or spec.mlp).kind
        fits = mlp is None if kind == "none" else type(mlp) is registry.lookup("mlp", kind).factory
        require(fits, f"an MLP is a {type(mlp).__name__}, expected {kind}")
        if layer.share is not None and layer.share in shared:
            require(mixer is shared[layer.share], f"layers that share {layer.share!r} have mixers of their own")
        else:
            require(id(mixer) not in seen, "layers share a mixer that the spec does not share")
        seen.add(id(mixer))
        if layer.share is not None:
            shared[layer.share] = mixer
