"""Estimates of patching from gradients: attribution patching (AtP), and AtP* with its two fixes (2403.00745)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.inspect.capturing import patch, taking
from contextlab.inspect.causal import Score
from contextlab.inspect.layout import chosen, sites
from contextlab.inspect.maps import mixing
from contextlab.inspect.taps import frozen
from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.models import Model

NODES = ("q", "k", "v", "heads")
ALIKE = 1e-3
"""Weights of attention that are made anew of queries and keys may be so far from a mixer's own."""


@dataclass(frozen=True)
class Read:
    """A text, read: what flows through each site, [B, T, ...], and what the answers score, [B].

    gradients: of the sum of the scores; site -> [B, T, ...].
    """

    values: Mapping[str, Tensor]
    score: Tensor
    gradients: Mapping[str, Tensor]


def node_sites(model: Model) -> list[str]:
    """Queries, keys, values and answers of each layer's heads, as far as it has them; else its mixer's output."""
    known = sites(model)
    found: list[str] = []
    for number in range(len(model.blocks) * model.spec.loops):
        mixer = f"blocks.{number}.mixer"
        own = [f"{mixer}.{each}" for each in NODES if f"{mixer}.{each}" in known]
        found += own if f"{mixer}.heads" in own else [f"{mixer}.output"] * (f"{mixer}.output" in known)
    return found


def read(
    model: Model, inputs: Tensor, score: Score, names: Iterable[str], drop: int | None = None, gradients: bool = True
) -> Read:
    """Read a text, and take what flows and its gradients.

    inputs: [B, T] or [B, T, d]. drop: a layer through whose mixer and MLP no gradient flows (GradDrop).
    """
    asked = chosen(model, names)
    edits: dict[str, Any] = {"embedded": lambda value: value.detach().requires_grad_()} if gradients else {}
    if drop is not None:
        parts = [f"blocks.{drop}.{part}.output" for part in ("mixer", "mlp")]
        edits |= {part: torch.Tensor.detach for part in parts if part in sites(model, named=False)}
    with frozen(model):
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(patch(model, edits))
            taken = stack.enter_context(taking(model, asked))
            scores = score(model(inputs))
            total = scores.sum()
        values = {name: taken[name] for name in asked}
        found: dict[str, Tensor] = {}
        if gradients:
            made = [name for name, value in values.items() if value.requires_grad]
            slopes = torch.autograd.grad(total, [values[name] for name in made], allow_unused=True)
            found = {name: slope for name, slope in zip(made, slopes, strict=True) if slope is not None}
        zeros = {name: torch.zeros_like(value) for name, value in values.items() if name not in found}
    return Read({name: value.detach() for name, value in values.items()}, scores.detach(), {**zeros, **found})


@dataclass(frozen=True)
class Estimates:
    """Of each site [B, T, heads]: how much its clean value, put in alone at a place and head, would move the score.

    plain: by the gradient (AtP). fixed: with both fixes, absolute values (AtP*). attended: layers whose queries and
    keys have the fix.
    """

    plain: dict[str, Tensor]
    fixed: dict[str, Tensor]
    attended: list[int]


def estimates(
    model: Model, clean: Tensor, corrupted: Tensor, score: Score, names: list[str], places: bool = True
) -> Estimates:
    """AtP and AtP* of putting clean values into the corrupted text.

    AtP takes the score to be linear between the two texts. That fails where a softmax is sure of itself: its gradient
    is 0, and another key would still turn it over. So of queries and keys AtP* makes the weights of attention anew, and
    takes only what follows to be linear (the QK fix; here of a plain softmax over all tokens so far, where that gives
    back the mixer's own weights). It fails, too, where a value's effects by two ways cancel to first order: AtP* takes
    the mean, over layers, of the absolute estimates without the ways through that layer's mixer and MLP (GradDrop; not
    in a model of one layer).

    clean, corrupted: [B, T] or [B, T, d]. places: each place alone; else all of a head at once, in [B, 1, heads].
    """
    if torch.is_inference_mode_enabled():
        raise InputError("attribution: there are no gradients within torch.inference_mode; call it outside")
    layers = len(model.blocks) * model.spec.loops
    there = read(model, clean, score, names, gradients=False).values
    drops: list[int | None] = [None, *(range(layers) if layers > 1 else ())]
    plain: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    attended = _attended(model, clean, corrupted, there, names)
    for drop in drops:
        here = read(model, corrupted, score, names, drop)
        for name in names:
            moved = here.gradients[name] * (there[name] - here.values[name])
            found = _by_head(moved, places)
            if drop is None:
                plain[name] = found
                if layers > 1:
                    continue
            mixer, _, point = name.rpartition(".")
            if point in ("q", "k") and int(name.split(".")[1]) in attended:
                found = _attention(mixer, point, here, there, places)
            total[name] = total.get(name, torch.zeros_like(found)) + found.abs()
    return Estimates(plain, {name: each / max(1, layers - 1) for name, each in total.items()}, attended)


def _by_head(moved: Tensor, places: bool) -> Tensor:
    """[B, T, H, ...] -> [B, T or 1, H], [B, T, D] -> [B, T or 1, 1]."""
    found = moved.flatten(3).sum(-1) if moved.ndim > 3 else moved.sum(-1) if moved.ndim > 2 else moved
    found = found if moved.ndim > 3 else found.unsqueeze(-1)
    return found if places else found.sum(1, keepdim=True)


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """Causal logits [B, H, T, T] of queries [B, T, H, K] and keys [B, T, Hkv, K]."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    found = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    ahead = torch.ones(found.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return found.masked_fill(ahead, -torch.inf)


def _attended(
    model: Model, clean: Tensor, corrupted: Tensor, there: Mapping[str, Tensor], names: list[str]
) -> list[int]:
    """The layers whose weights are the softmax of their queries and keys, in both texts."""
    found = []
    for number, layer in enumerate(model.blocks):
        mixer = f"blocks.{number}.mixer"
        own = getattr(layer, "mixer", None)
        if model.spec.loops > 1 or not isinstance(own, AttentionMixer) or not own.tells_mixing:
            continue
        if any(f"{mixer}.{each}" not in names for each in NODES) or getattr(layer, "router", None) is not None:
            continue
        with torch.no_grad():
            weights = mixing(model, clean, [number])[mixer]
        q, k, v, z = (there[f"{mixer}.{each}"] for each in NODES)
        made = _logits(q, k).softmax(-1)
        answer = torch.einsum("bhts,bshd->bthd", made, v.repeat_interleave(z.shape[2] // v.shape[2], 2))
        if torch.allclose(made, weights, atol=ALIKE) and torch.allclose(answer, z, atol=ALIKE, rtol=ALIKE):
            found.append(number)
    return found


def _attention(mixer: str, point: str, here: Read, there: Mapping[str, Tensor], places: bool) -> Tensor:
    """The QK fix: what clean queries or keys do to the answers of attention, times the answers' gradient."""
    q, k, v, z = (here.values[f"{mixer}.{each}"] for each in NODES)
    slope = here.gradients[f"{mixer}.heads"]
    group = q.shape[2] // k.shape[2]
    v = v.repeat_interleave(group, 2)
    told = torch.einsum("bthd,bshd->bhts", slope, v)  # what a weight of 1 on s would add to the score at t
    old = (slope * z).sum(-1).transpose(1, 2)  # [B, H, T]
    logits = _logits(q, k)
    if point == "q" or not places:
        swapped = _logits(there[f"{mixer}.q"], k) if point == "q" else _logits(q, there[f"{mixer}.k"])
        each = ((swapped.softmax(-1) * told).sum(-1) - old).transpose(1, 2)  # [B, T, H]
        each = each if places else each.sum(1, keepdim=True)
    else:
        # Of one key s alone: w is its new weight, and the others share the rest as they did before.
        rest = _without(logits)
        weight = torch.sigmoid(_logits(q, there[f"{mixer}.k"]) - rest)
        signs = [_without(logits + (sign * told).clamp_min(0).log()) for sign in (1, -1)]  # by sign, as these are logs
        others = ((signs[0] - rest).exp() - (signs[1] - rest).exp()).nan_to_num()  # 0 where there is no other
        moved = torch.where(logits.isfinite(), weight * told + (1 - weight) * others - old.unsqueeze(-1), 0.0)
        each = moved.sum(2).transpose(1, 2)
    if point == "k":
        each = each.unflatten(2, (-1, group)).sum(-1)
    return each


def _without(logits: Tensor) -> Tensor:
    """log sum exp of all entries of a row but each one, [..., T, T]."""
    first, last = (_running(each) for each in (logits, logits.flip(-1)))
    return torch.logaddexp(first, last.flip(-1))


def _running(logits: Tensor) -> Tensor:
    """log sum exp of the entries before each one."""
    shifted = torch.cat([torch.full_like(logits[..., :1], -torch.inf), logits[..., :-1]], -1)
    return torch.logcumsumexp(shifted, -1)
