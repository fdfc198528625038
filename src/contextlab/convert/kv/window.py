"""Lazy layers to windows: layers that look at the first and the last tokens only need keep no others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from contextlab.convert.calibration import Calibration
from contextlab.convert.kv.options import Reoptioned
from contextlab.convert.mixing import choose, require_in_reach
from contextlab.convert.teacher import read_layers
from contextlab.errors import InputError
from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model
from contextlab.registry import register


@register(
    "conversion",
    "window",
    family="kv",
    papers=("2410.13846", "2309.17453"),
    cases=({"window": 8, "sinks": 2}, {"window": 4, "layers": [1, 2], "sinks": 0}),
)
@dataclass(frozen=True)
class Window(Reoptioned):
    """Attention to `sliding_window` with the same weights; with `count`, in the laziest layers.

    A layer is lazy where its queries give most of their attention to the tokens that the window and the sinks keep,
    averaged over heads and over all queries that see more; `light_transfer` asks the last queries only, as its paper.
    Exact where no text is longer than the window. Training-free.

    layers: which attention layers, or of which the laziest are taken: "all", "half" or numbers such as "0,2,4".
    window: tokens that a query sees, its own counted.
    sinks: first tokens, which stay in sight.
    count: how many layers, the laziest by the calibration data; None takes all that are chosen, without data.
    """

    takes: ClassVar[tuple[str, ...] | None] = ("attention",)

    window: PositiveInt = 64
    sinks: NonNegativeInt = 4
    count: PositiveInt | None = None

    def changed(self, model: Model | ModelSpec, data: Calibration | None) -> list[int]:
        """See `Reoptioned.changed`."""
        spec = model.spec if isinstance(model, Model) else model
        found = choose(spec, self.layers, kinds=("attention",))
        count = self.wanted(len(found))
        if count is None:
            return found
        if count > len(found):
            raise InputError(f"count {count} is more than the {len(found)} layers that can be converted")
        if not isinstance(model, Model):
            return found[:count]
        if data is None:
            raise InputError("window: count needs data to find the laziest layers; give a task or text, or layers")
        shares = lazy_shares(model, found, data, self.window, self.sinks, self.asked())
        return sorted(sorted(found, key=lambda i: -shares[i])[:count])

    def wanted(self, layers: int) -> int | None:
        """How many of so many layers change, the laziest; None: all."""
        return self.count

    def asked(self) -> int | None:
        """How many of a prompt's last queries tell how lazy a layer is; None: all that see more than is kept."""
        return None

    def become(self, old: AttentionMixer, layer: int) -> tuple[str, dict[str, Any]]:
        """See `Reoptioned.become`."""
        if old.position == "xpos":
            raise InputError(f"window: layer {layer} has position 'xpos', which sliding_window has not")
        return "sliding_window", {"window": self.window, "sinks": self.sinks}

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """See `Conversion.plan`."""
        require_in_reach(spec, window=self.window, sinks=self.sinks)
        return super().plan(spec)

    def words(self, data: Calibration | None) -> str:
        """See `Reoptioned.words`."""
        return f"window of {self.window} tokens and {self.sinks} sinks"


@register(
    "conversion",
    "light_transfer",
    family="kv",
    papers=("2410.13846",),
    cases=({"window": 6, "sinks": 1, "last": 4}, {"window": 4, "layers": [0, 1], "count": 1, "last": 2}),
)
@dataclass(frozen=True)
class LightTransfer(Window):
    """The laziest half of the attention layers looks at the first and the most recent tokens only.

    How lazy a layer is, is the mean over the last queries of a prompt of the attention, averaged over heads, that they
    give to its first `sinks` and last `window` tokens (2410.13846, eq. 1). Other than in the paper's form for tests the
    layers are chosen once, over all prompts of the data, and not for each prompt while it is read; what the recent
    tokens are then moves with each query, as in its form for training.

    layers: of which attention layers the laziest are taken: "all", "half" or numbers such as "0,2,4".
    window: tokens that a query sees, its own counted.
    sinks: first tokens, which stay in sight.
    count: how many layers; None is half of them, as in the paper.
    last: queries at the end of each prompt that are asked.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    places_by_data: ClassVar[bool] = True

    last: PositiveInt = 32

    def wanted(self, layers: int) -> int | None:
        """See `Window.wanted`."""
        return max(1, layers // 2) if self.count is None else self.count

    def asked(self) -> int | None:
        """See `Window.asked`."""
        return self.last

    def words(self, data: Calibration | None) -> str:
        """See `Reoptioned.words`."""
        longest = 0 if data is None else max(prompt.length for prompt, _ in data.batches)
        fewer = f", of which prompts have {longest}" if longest < self.last else ""
        return f"{super().words(data)}, by the last {self.last} queries{fewer}"


@torch.no_grad()
def lazy_shares(
    model: Model, layers: list[int], data: Calibration, window: int, sinks: int, last: int | None = None
) -> dict[int, float]:
    """The share of each layer's attention that falls on its window and sinks, over all queries that see more.

    last: only so many of each prompt's last queries count, and the window of all of them is that of the last one.

    Raises InputError where no prompt is longer than the two.
    """
    total, count = dict.fromkeys(layers, 0.0), 0
    first = next(model.parameters())
    for prompt, _ in data.batches:
        if prompt.length <= window + sinks:
            continue
        given, _made = read_layers(model, prompt.to(first.device, first.dtype).inputs, layers)
        first_query = window + sinks if last is None else max(0, prompt.length - last)
        count += prompt.batch * (prompt.length - first_query)
        for i, x in zip(layers, given, strict=True):
            mixer = model.blocks[i].mixer
            assert isinstance(mixer, AttentionMixer)
            weights = attention_weights(mixer, x)[:, :, first_query:]
            at = torch.arange(x.shape[1], device=x.device)
            ago = (at[first_query:, None] if last is None else at[-1]) - at
            kept = (ago < window) | (at < sinks)
            total[i] += float((weights * kept).sum((0, 2, 3)).mean())
    if not count:
        raise InputError(
            f"window {window} and sinks {sinks}: no prompt of the data is longer than the {window + sinks} tokens that "
            "stay in sight; give longer ones, or a smaller window"
        )
    return {i: total[i] / count for i in layers}


def attention_weights(mixer: AttentionMixer, x: Tensor) -> Tensor:
    """The weights [B, H, T, T] by which each query of x [B, T, D] reads each key, in float32 at least."""
    qk, _, before, _ = mixer._project_in(x, None, None, False)
    q, k = mixer._encode(x, qk, before, None)
    k = k.repeat_interleave(mixer.heads // mixer.kv_heads, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores / math.sqrt(mixer.head_dim)
    at = torch.arange(x.shape[1], device=x.device)
    if mixer.slopes is not None:
        scores = scores - mixer.slopes[:, None, None] * (at[:, None] - at)
    return scores.masked_fill(at > at[:, None], float("-inf")).softmax(-1)
