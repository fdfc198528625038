"""Policies whose score is trained: Locret's retaining heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import SCORES, KVLayer
from contextlab.ops.softmax import capped
from contextlab.policies.core.training import read_trained, write_trained
from contextlab.policies.eviction.base import EvictionPolicy
from contextlab.policies.eviction.seen import Seen
from contextlab.policies.eviction.two_pass import Read, Recorder
from contextlab.registry import register


@register("policy", "locret", family="trained", papers=("2410.01805",), cases=())
@dataclass(eq=False)
class Locret(EvictionPolicy):
    """Locret: small trained heads say how much each token will matter, from its own query, key and value.

    A layer's retaining head is a two-layer perceptron on all heads' queries, keys and values of a token, before their
    rotation; it gives each key head a score, once, that is held with the token. `fit` trains it to predict the
    greatest attention logit (scaled, before the softmax) that the queries of an answer give the token, by a smooth L1
    loss and a small penalty on unlike scores of neighbours. The model itself stays as it is. Differs from the paper
    in that tokens are dropped while decoding as well, and in the training's length; ALiBi is not served.

    sinks: first tokens of each row that are never dropped; the paper has none.
    window: last tokens that are never dropped, the paper's stabilizers.
    weights: folder of trained heads that `save` wrote; None for heads that `fit` will train.
    hidden: hidden units of a head; the paper takes 1024 for models of billions of parameters.
    """

    marks = True  # what is held with each token is its score
    sinks: int = 0
    weights: str | Path | None = None
    hidden: int = 128
    reposition: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(hidden=(self.hidden, 1))
        self.heads: list[nn.Sequential] = []
        if self.weights is not None:
            self._load(Path(self.weights))

    @property
    def turns(self) -> bool:
        """See `Policy.turns`."""
        return True

    @property
    def needs(self) -> str:
        """See `Policy.needs`."""
        return "each token's own query"

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        if self.untrained:
            raise InputError(
                "Locret: its heads are untrained; train them with policy.fit(model, tokens, answer) or give "
                "weights=FOLDER of trained ones"
            )
        trained = [(head[0].in_features, head[2].out_features) for head in self.heads]
        count, (numbers, kv_heads) = layers[0].count, _sizes(layers[0])
        if len(trained) != count or any(_sizes(layer) != trained[layer.index] for layer in layers):
            raise InputError(
                f"Locret: the heads are of another model: trained for {len(trained)} layers of {trained[0][0]} numbers "
                f"and {trained[0][1]} key heads, this one has {count} of {numbers} and {kv_heads}"
            )
        super().check(layers)

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: what the retaining head said when the token was read."""
        assert seen.mass is not None
        return seen.mass

    def mark(self, layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        """See `EvictionPolicy.mark`: what the layer's retaining head says."""
        head = self.heads[layer.index].to(q.device)
        scores: Tensor = head(_features(layer, q, k, v, at).to(q.device, next(head.parameters()).dtype)).mT
        return scores

    @property
    def untrained(self) -> str:
        """See `Policy.untrained`."""
        return "" if self.heads else "its heads"

    def train_on(self, model: Any, tokens: Tensor, answer: int, *, steps: int, seed: int = 0) -> None:
        """See `Policy.train_on`."""
        self.fit(model, tokens, answer, steps=steps, seed=seed)

    def fit(
        self,
        model: Any,
        tokens: Tensor,
        answer: int,
        *,
        steps: int = 1000,
        batch: int = 8,
        lr: float = 5e-4,
        smooth: float = 0.0025,
        seed: int = 0,
    ) -> list[float]:
        """Train the retaining heads on a model's own attention; the model does not change.

        model: ours, or `contextlab.models.HuggingFaceModel`. tokens: [N, T] prompts, each with its answer behind it.
        answer: how many of the last tokens are the answer. steps: optimizer steps, each on `batch` prompts drawn
        anew. lr: the highest rate, after a tenth of the steps; it falls to 0 at the end. smooth: weight of the
        penalty on unlike neighbours. seed: of the first weights and the draws.

        Returns the loss of each step. Raises InputError on impossible options.
        """
        if tokens.ndim < 2 or not 0 < answer < tokens.shape[1]:
            raise InputError(
                f"answer: expected 1 to {tokens.shape[1] - 1 if tokens.ndim > 1 else 0} of the prompts' last tokens, "
                f"got {answer} of {list(tokens.shape)}"
            )
        for name, value in (("steps", steps), ("batch", batch)):
            if value < 1:
                raise InputError(f"{name}: expected a whole number of at least 1, got {value!r}")
        recorder = Recorder()
        layers = recorder.layers(model)
        generator = torch.Generator().manual_seed(seed)
        like = next(model.parameters())
        heads = [_head(layer, self.hidden, like, generator) for layer in layers]
        weights = [weight for head in heads for weight in head.parameters()]
        optimizer, warm = torch.optim.AdamW(weights, lr, betas=(0.9, 0.95)), max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda at: min((at + 1) / warm, (steps - at) / max(1, steps - warm))
        )
        losses = []
        for _ in range(steps):
            rows = torch.randint(len(tokens), (min(batch, len(tokens)),), generator=generator)
            with recorder.attach(model), torch.no_grad():
                model.read(tokens[rows.to(tokens.device)])
            with torch.enable_grad():
                loss = torch.stack(
                    [_loss(layer, heads[layer.index], recorder.last[layer.index], answer, smooth) for layer in layers]
                ).mean()
                optimizer.zero_grad()
                loss.backward()
            nn.utils.clip_grad_value_(weights, 0.5)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        for weight in weights:
            weight.requires_grad_(False)
        self.heads = heads
        return losses

    def save(self, folder: str | Path) -> None:
        """Write the trained heads: safetensors and a JSON file of their sizes. Raises InputError when untrained."""
        if not self.heads:
            raise InputError("Locret: there is nothing to save; train the heads first with policy.fit(...)")
        write_trained(Path(folder), "locret", self.heads, hidden=self.hidden)

    def _load(self, folder: Path) -> None:
        layers, tensors = read_trained(
            folder, "locret", "these are no retaining heads; expected what Locret.save wrote"
        )
        heads = []
        for i in range(layers):
            first, last = tensors.get(f"{i}.0.weight"), tensors.get(f"{i}.2.weight")
            if first is None or last is None or first.ndim != 2 or last.shape[1:] != first.shape[:1]:
                raise InputError(f"{folder / 'locret.safetensors'}: damaged: the head of layer {i} is not complete")
            head = _perceptron(first.shape[1], first.shape[0], last.shape[0])
            head.load_state_dict({"0.weight": first, "2.weight": last}, assign=True)
            heads.append(head.to(first.dtype).requires_grad_(False))
        self.heads, self.hidden = heads, int(heads[0][0].out_features)  # type: ignore[arg-type]


def _sizes(layer: KVLayer) -> tuple[int, int]:
    """Numbers that a retaining head reads of a token, and that it gives."""
    kv = layer.kv_heads * (layer.key_dim + layer.value_dim)
    return layer.heads * layer.key_dim + kv, layer.kv_heads


def _perceptron(given: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(given, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, out, bias=False))


def _head(layer: KVLayer, hidden: int, like: Tensor, generator: torch.Generator) -> nn.Sequential:
    """An untrained retaining head, of the dtype and on the device of `like`."""
    given, out = _sizes(layer)
    head = _perceptron(given, hidden, out)
    for weight in head.parameters():
        nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5, generator=generator)
    return head.to(like.device, like.dtype)


def _features(layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    """What a retaining head reads of tokens: q, k, v [B, T, heads, dim] -> [B, T, numbers].

    at: [B or 1, T] int64, by how many steps the tokens are rotated.
    """
    if layer.turn is not None:  # the same token is to be judged alike wherever it stands
        back = -at[..., None]
        q, k = layer.turn(q, back), layer.turn(k, back)
    return torch.cat((q.flatten(2), k.flatten(2), v.flatten(2)), 2)


def greatest_logits(layer: KVLayer, read: Read, answer: int) -> Tensor:
    """The greatest score that any of the last `answer` queries gives each token before: [B, Hkv, T - answer]."""
    q = (read.q[:, -answer:] * layer.scale).transpose(1, 2).unflatten(1, (layer.kv_heads, -1)).flatten(2, 3)
    k = read.k[:, :-answer].transpose(1, 2)
    block = max(1, SCORES // max(1, k.shape[0] * k.shape[1] * k.shape[2]))
    return capped(torch.stack([(rows @ k.mT).amax(2) for rows in q.split(block, 2)]).amax(0), layer.cap)


def _loss(layer: KVLayer, head: nn.Module, read: Read, answer: int, smooth: float) -> Tensor:
    """The training loss of one layer's retaining head."""
    at = torch.arange(read.q.shape[1], device=read.q.device)[None]
    told = head(_features(layer, read.q, read.k, read.v, at)[:, :-answer]).mT
    wanted = greatest_logits(layer, read, answer)
    unlike = (told[..., 1:] - told[..., :-1]).square().mean() if told.shape[2] > 1 else told.new_zeros(())
    return nn.functional.smooth_l1_loss(told, wanted) + smooth * unlike
