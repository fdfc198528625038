"""Shorter prompts: the tokens that a few heads look at are kept, and the model reads them anew."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import KVLayer, attend_cached, attention_rows
from contextlab.policies.core.base import Policy
from contextlab.policies.core.budget import Budget
from contextlab.policies.core.ranking import in_order
from contextlab.spec import describe
from contextlab.state import KVState, State

Head = tuple[int, int]


@dataclass(frozen=True)
class ShortPrompt:
    """What is left of a batch of prompts, in order.

    tokens: [B, n] int64. mask: [B, n] bool, False at left padding; None without any.
    index: [B, n] int64, where each token stood in the batch; at padding, any.
    """

    tokens: Tensor
    mask: Tensor | None
    index: Tensor


@torch.no_grad()
def compress_prompt(
    model: nn.Module,
    tokens: Tensor,
    keep: Budget | str | float,
    heads: list[Head],
    *,
    window: int = 16,
    sinks: int = 4,
    kernel: int = 5,
    mask: Tensor | None = None,
) -> ShortPrompt:
    """The tokens of a prompt that evaluator heads look at from its end (EHPC, 2501.12959).

    The model reads the prompt up to the last layer of these heads. A token's score is their attention to it from the
    last `window` tokens (1: the last one, as in the paper), averaged over heads and queries and then over `kernel`
    neighbours; the first `sinks` and the last `window` tokens, in which the question may stand, are kept anyway. What
    is kept is text again: this model or another one reads it with positions of its own. Its state is freed.

    model: ours, or one of transformers, with softmax attention. tokens: [B, T] int64.
    keep: what is kept of each prompt, "25%" of its tokens or "512tok" of them.
    heads: (layer, head) of each, layers counted among those with softmax attention; see `evaluator_heads`.
    window, sinks: tokens that are kept at the ends. kernel: neighbours over which scores are averaged, odd.
    mask: [B, T] bool, False at left padding.

    Raises InputError on heads that the model has not, and where less would be kept than the ends.
    """
    budget = Budget.of(keep)
    if budget.kind == "bytes":
        raise InputError(f"keep: a prompt has tokens, not bytes; expected 25% or 512tok, got {keep}")
    check_whole(window=(window, 1), sinks=(sinks, 0), kernel=(kernel, 1))
    if kernel % 2 == 0:
        raise InputError(f"kernel: expected an odd whole number, got {kernel}; the nearest is {kernel + 1}")
    real = _real(tokens, mask)
    have = real.sum(1)
    if budget.kind == "ratio":
        left = (budget.amount * have.double() - 1e-9).ceil().long()  # 10% of 30 are 3, though rounding makes it more
    else:
        left = have.clamp_max(int(budget.amount))
    short = (left < have) & (left <= sinks + window)
    if bool(short.any()):
        row = int(short.nonzero()[0])
        raise InputError(
            f"keep: {budget} of {int(have[row])} tokens (row {row}) is {int(left[row])}, not more than the sinks "
            f"{sinks} + window {window} that are always kept; raise it to {sinks + window + 1}tok or lower window"
        )
    rows = observed(model, tokens, heads, window, mask)  # [B, heads, window, T]
    place = torch.arange(tokens.shape[1], device=tokens.device) - (~real).sum(1, keepdim=True)
    ends = (place < sinks) | (place >= have[:, None] - window)
    score = rows.mean((1, 2)).masked_fill(place >= have[:, None] - window, 0.0)  # which would else lift its neighbours
    score = avg_pool1d(score[:, None], kernel, 1, kernel // 2)[:, 0]
    score = score.masked_fill(ends, float("inf")).masked_fill(~real, float("-inf"))
    order = in_order(score, int(left.max()))
    chosen = torch.arange(order.shape[1], device=order.device) < left[:, None]
    index = order.masked_fill(~chosen, -1).sort(1).values  # what a shorter prompt has not stands in front
    there = index >= 0
    index = index.clamp_min(0)
    return ShortPrompt(tokens.gather(1, index), None if bool(there.all()) else there, index)


@torch.no_grad()
def evaluator_heads(
    model: nn.Module,
    tokens: Tensor,
    evidence: Tensor,
    count: int = 8,
    *,
    layers: int | None = None,
    mask: Tensor | None = None,
) -> list[Head]:
    """The heads whose attention from the last token of a prompt is most on its evidence (2501.12959).

    They are found once for a model, on prompts such as needles in a haystack whose needles are known.

    model: see `compress_prompt`. tokens: [B, T] int64. evidence: [B, T] bool, the tokens that answer the last one.
    count: heads to name, the best first. layers: only the first ones, so that compression reads as few; None for all.
    mask: [B, T] bool, False at left padding.

    Returns (layer, head) of each.
    """
    real = _real(tokens, mask)
    if evidence.dtype != torch.bool or evidence.shape != tokens.shape or not bool((evidence & real).any(1).all()):
        raise InputError(f"evidence: expected bool {list(tokens.shape)} with some True in each prompt")
    found = _Observer.layers_of(model)
    depth = len(found) if layers is None else layers
    every = [(layer.index, head) for layer in found[:depth] for head in range(layer.heads)]
    if not 1 <= depth <= len(found):
        raise InputError(f"layers: expected 1 to {len(found)}, as many as have softmax attention, got {layers}")
    if not 1 <= count <= len(every):
        raise InputError(f"count: expected 1 to {len(every)}, the heads of {depth} layers, got {count}")
    rows = observed(model, tokens, every, 1, mask)
    on = (rows[:, :, -1] * evidence[:, None]).sum(-1).mean(0)
    return [every[i] for i in on.argsort(descending=True, stable=True)[:count].tolist()]


@torch.no_grad()
def observed(model: nn.Module, tokens: Tensor, heads: list[Head], window: int, mask: Tensor | None = None) -> Tensor:
    """The attention weights [B, heads, window, T] of the last `window` tokens; zeros where a query is padding.

    The model reads up to the last layer of these heads, and no further.
    """
    sizes = {layer.index: layer.heads for layer in _Observer.layers_of(model)}
    if not heads:
        raise InputError("heads: expected (layer, head) of at least one; evaluator_heads finds them")
    for layer, head in heads:
        if layer not in sizes or not 0 <= head < sizes[layer]:
            most = f"layers 0 to {len(sizes) - 1}, each with heads 0 to {sizes.get(layer, sizes[0]) - 1}"
            raise InputError(f"heads: ({layer}, {head}) is no head of the model; it has {most}")
    wanted = {layer: [head for at, head in heads if at == layer] for layer, _ in heads}
    observer = _Observer(wanted, window)
    with observer.attach(model), contextlib.suppress(_Enough):
        model(tokens, mask)
    of = {(layer, head): observer.rows[layer][:, i] for layer, own in wanted.items() for i, head in enumerate(own)}
    return torch.stack([of[head] for head in heads], 1)


class _Enough(Exception):
    """All that was asked for has been seen."""


class _Observer(Policy):
    """Answers as no policy would, and notes the last queries' attention of some heads; then stops the model."""

    serves_caps = True

    def __init__(self, heads: dict[int, list[int]], window: int) -> None:
        self.heads, self.window = heads, window
        self.rows: dict[int, Tensor] = {}

    @classmethod
    def layers_of(cls, model: nn.Module) -> list[KVLayer]:
        """The model's layers of softmax attention."""
        return cls({}, 1).layers(model)

    def attend(
        self,
        layer: KVLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None,
        mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        """See `Policy.attend`."""
        length = q.shape[1]
        at = torch.arange(length, device=q.device)[None]
        positions = at[:, None].expand(-1, layer.kv_heads, -1)
        keys = k.transpose(1, 2)
        if layer.index in self.heads:
            last = min(self.window, length)
            rows = attention_rows(
                q[:, -last:], keys, scale=layer.scale, visible=mask, slopes=layer.slopes, cap=layer.cap,
                q_position=at[:, -last:], k_position=positions,
            )  # fmt: skip
            if mask is not None:
                rows = rows * mask[:, None, -last:, None]
            self.rows[layer.index] = rows[:, self.heads[layer.index]]
        if len(self.rows) == len(self.heads):
            raise _Enough
        y = attend_cached(
            q, keys, v.transpose(1, 2), scale=layer.scale, visible=mask, slopes=layer.slopes, cap=layer.cap,
            q_position=at, k_position=positions,
        )  # fmt: skip
        return y, None

    def convert(self, layer: KVLayer, state: KVState) -> State:
        """See `Policy.convert`: as it is."""
        return state


def _real(tokens: Tensor, mask: Tensor | None) -> Tensor:
    if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        raise InputError(f"a prompt: expected token ids [B, T] int64, got {describe(tokens)}")
    if mask is None:
        return torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    if mask.dtype != torch.bool or mask.shape != tokens.shape or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputError(f"mask: expected bool {list(tokens.shape)}, False at left padding only")
    return mask
