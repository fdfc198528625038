"""Dynamic memory compression: trained gates say of each token whether it opens a slot or joins the last one."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, relu

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import KVLayer
from contextlab.ops.precision import working_dtype
from contextlab.policies.core.base import Policy
from contextlab.policies.core.budget import OPEN, Amount, Budget
from contextlab.policies.core.slots import read_on
from contextlab.policies.core.training import language_training, read_trained, write_trained
from contextlab.policies.eviction.merged_slots import (
    MergedState,
    answer_one,
    answer_piece,
    attend_biased,
    empty,
    partial_means,
    pushed,
    reduced,
    slots_after,
)
from contextlab.policies.eviction.two_pass import Recorder
from contextlab.registry import register
from contextlab.state import KVState, State, tensor_bytes

INITIAL_LOGIT = 5.0
"""How far from merging gates start, as a logit; and from counting a token for nothing (Section 3.2)."""


@dataclass
class _Relaxed:
    """What a training step draws, and what it notes of the decisions: of each layer [B, Hkv, T]."""

    generator: torch.Generator
    temperature: float
    decisions: list[Tensor] = dataclasses.field(default_factory=list)


@register("policy", "dmc", family="merging", papers=("2403.09636",), cases=())
@dataclass(eq=False)
class DMC(Policy):
    """Dynamic memory compression (DMC): each head appends a token to its cache or merges it into its last slot.

    A trained gate decides of each token and key head (alpha) and gives the token a weight (omega); a slot is the
    weighted mean of its tokens' keys and values (Section 3.1). Keys are averaged before their rotation, and stand where
    the slot's last token stood, as in the authors' code. Merged tokens take no memory, and heads that merge much leave
    theirs to the others. `fit` learns the gates for a ratio of compression (Section 3.2).

    Differs from the paper in the gates: there the first neurons of key and query are given up for them, and all weights
    of the model learn to do without; here a linear map of the token's values, which no rotation changes, gives alpha
    and omega of all key heads, so that a gate that never merges leaves a model as it was, and the gates may be trained
    alone. The paper has no budget: where the gates append more than it holds, the merges that they came closest to
    are made here, so the budget holds at every step. Tokens are merged over any distance, in
    training, too, where the paper's implementation looks back 12.

    budget: the most that may be held: "10%", "512tok" (a head's, on average), "64MB". None leaves it to the gates. Each
        head holds one slot at least, as at the start of every sequence.
    every: slots of a head made free at a time while decoding, where the budget is used up; default an eighth.
    weights: folder of trained gates that `save` wrote; None for gates that `fit` will train.
    """

    serves_caps = True

    values_apart = "judges tokens by their values"

    budget: Amount = None
    every: int | None = None
    weights: str | Path | None = None
    fits_budget = True

    def __post_init__(self) -> None:
        check_whole(**({} if self.every is None else {"every": (self.every, 1)}))
        self.allowed = Budget.of(self.budget)
        self.gates: list[nn.Linear] = []
        self._relaxed: _Relaxed | None = None
        if self.weights is not None:
            self._load(Path(self.weights))

    def with_budget(self, budget: Amount) -> DMC:
        """See `Policy.with_budget`."""
        other = copy.copy(self)
        other.budget = other.allowed = Budget.of(budget)
        return other

    @property
    def turns(self) -> bool:
        """See `Policy.turns`: keys are merged at one place."""
        return True

    @property
    def untrained(self) -> str:
        """See `Policy.untrained`."""
        return "" if self.gates else "its gates"

    def train_on(self, model: Any, tokens: Tensor, answer: int, *, steps: int, seed: int = 0) -> None:
        """See `Policy.train_on`: for the ratio that its budget asks for, for 2 where that holds everything."""
        length = tokens.shape[1]
        if self.allowed.kind == "bytes":
            dtype = next(model.parameters()).dtype
            full = sum(
                tensor_bytes(length, each.kv_heads, each.key_dim + each.value_dim, dtype=dtype)
                for each in Recorder().layers(model)
            )
        else:
            full = length if self.allowed.kind == "tokens" else 1
        ratio = full / self.allowed.amount
        self.fit(model, tokens, ratio if ratio > 1 else 2.0, steps=steps, seed=seed)

    @property
    def lossless(self) -> bool:
        """See `Policy.lossless`: gates merge whatever memory there is."""
        return False

    @property
    def chunk_invariant(self) -> bool:
        """See `Policy.chunk_invariant`: a gate sees its token alone, but a budget is kept to after each piece."""
        return self.allowed.everything

    def __or__(self, other: Policy) -> Policy:
        """See `Policy.__or__`: refused."""
        raise InputError(
            f"DMC | {type(other).__name__}: DMC goes on averaging into its slots, so nothing else can "
            "store them; use one of the two"
        )

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        if self.untrained:
            raise InputError(
                "DMC: its gates are untrained; train them with policy.fit(model, tokens, ratio) or give weights=FOLDER "
                "of trained ones"
            )
        trained = [(gate.in_features, gate.out_features // 2) for gate in self.gates]
        sizes = {layer.index: (layer.kv_heads * layer.value_dim, layer.kv_heads) for layer in layers}
        count, (numbers, kv_heads) = layers[0].count, sizes[layers[0].index]
        if len(trained) != count or any(size != trained[index] for index, size in sizes.items()):
            raise InputError(
                f"DMC: the gates are of another model: trained for {len(trained)} layers of {trained[0][1]} key "
                f"heads and {trained[0][0]} numbers, this one has {count} of {kv_heads} and {numbers}"
            )

    def room(self, layer: KVLayer, length: int, batch: int, dtype: torch.dtype) -> int:
        """The most slots of the pool a row, all heads together, once `length` tokens were read."""
        if self.allowed.everything:
            return OPEN
        if self.allowed.kind == "tokens":
            return (int(self.allowed.amount) - 1) * layer.kv_heads
        slot = tensor_bytes(layer.key_dim + layer.value_dim, dtype=dtype) + 4 + 4 + working_dtype(dtype).itemsize
        fixed = batch * (8 + layer.kv_heads * slot)
        if self.allowed.kind == "ratio":
            full = tensor_bytes(length, batch, layer.kv_heads, layer.key_dim + layer.value_dim, dtype=dtype)
            allowed = self.allowed.amount * full
        else:
            allowed = self.allowed.amount / layer.states
            if allowed < fixed:
                raise InputError(
                    f"budget: {self.allowed} does not hold one slot of each of {layer.kv_heads} heads in {batch} rows "
                    f"of {layer.states} layers; it takes {fixed * layer.states}B"
                )
        return max(0, int((allowed - fixed) // (batch * (slot + 2))))

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
        if self._relaxed is not None:
            return self._relaxed_attend(layer, q, k, v, self._relaxed), None
        state = self._continued(MergedState, layer, k, v, state)
        start, padded, length = read_on(state, mask, q.shape[1])
        places = torch.arange(state.length - 1, length, device=q.device) - start[:, None]  # the last slot's, too
        slots, opens = self._slots(layer, k, v, state, places)
        closed = opens[..., 1:] & (slots["position"][..., :-1] >= 0)
        y = None
        if q.shape[1] > 1:
            y = answer_piece(layer, q, state.pool, slots, closed, places)
            if not keep_state:
                return y, None
        limit = self.room(layer, length, len(q), k.dtype)
        after = MergedState(
            pushed(state.pool, slots, closed, limit, length),
            {name: x[:, :, -1].clone(memory_format=torch.contiguous_format) for name, x in slots.items()},
            start, padded, length=length,
        )  # fmt: skip
        if y is None:
            y = answer_one(layer, q, after, places)
        if after.pool.used > limit:
            after = reduced(layer, after, limit, self._target(layer, limit) if q.shape[1] == 1 else limit)
        return y, after if keep_state else None

    def _gate(self, layer: KVLayer, v: Tensor) -> tuple[Tensor, Tensor]:
        """From v [B, T, Hkv, V] each [B, Hkv, T]: the logit of merging, and the weight, above 0."""
        gate = self.gates[layer.index].to(v.device)
        merge, weight = gate(v.flatten(2).to(gate.weight.dtype)).mT.chunk(2, 1)
        wide = working_dtype(v.dtype)
        return merge.to(wide), weight.to(wide).sigmoid() + torch.finfo(wide).eps

    def _slots(
        self, layer: KVLayer, k: Tensor, v: Tensor, state: MergedState, places: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The last slot as it is before and after each new token, [B, Hkv, T + 1, ...], and which of them are new ones.

        places: [B, T + 1], in their rows, of the token before and the new ones.
        """
        with torch.no_grad():
            logit, weight = self._gate(layer, v)
        return slots_after(layer, k, v, state, places, logit, weight)

    def _target(self, layer: KVLayer, limit: int) -> int:
        """Slots of the pool that are kept, all heads together, where it is full while decoding."""
        each = max(1, limit // layer.kv_heads // 8) if self.every is None else self.every
        return max(0, limit - each * layer.kv_heads)

    def convert(self, layer: KVLayer, state: KVState) -> State:
        """See `Policy.convert`: all that it needs of a token is its key and value."""
        keys, values = state.cached()
        after = empty(keys, values)
        if not state.length:
            return after
        start = state.start
        places = torch.arange(-1, state.length, device=keys.device) - start[:, None]
        slots, opens = self._slots(layer, keys, values, after, places)
        closed = opens[..., 1:] & (slots["position"][..., :-1] >= 0)
        limit = self.room(layer, state.length, len(start), keys.dtype)
        after = MergedState(
            pushed(after.pool, slots, closed, limit, state.length),
            {name: x[:, :, -1].clone(memory_format=torch.contiguous_format) for name, x in slots.items()},
            start, state.padded, length=state.length,
        )  # fmt: skip
        return reduced(layer, after, limit, limit) if after.pool.used > limit else after

    def _relaxed_attend(self, layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, drawn: _Relaxed) -> Tensor:
        """The answer [B, T, H, V] of training, to whole rows: decisions between 0 and 1 (Section 3.2)."""
        logit, weight = self._gate(layer, v)
        uniform = torch.rand(logit.shape, generator=drawn.generator, device=q.device, dtype=torch.float64)
        noise = uniform.clamp(1e-12, 1 - 1e-12).logit().to(logit.dtype)  # of two Gumbels the difference
        logit = (logit + noise) / drawn.temperature
        drawn.decisions.append(logit.sigmoid())
        keys, values = partial_means(layer, k.transpose(1, 2), v.transpose(1, 2), logit, weight)
        # A slot is seen as far as the token after it did not join it; each token sees its own as it then is.
        bias = torch.nn.functional.pad(logsigmoid(-logit[..., 1:]), (0, 1)).to(q.dtype)
        places = torch.arange(q.shape[1], device=q.device)[None]
        return attend_biased(layer, q, keys, values, bias, places, places[:, None])

    def fit(
        self,
        model: Any,
        tokens: Tensor,
        ratio: float,
        *,
        steps: int = 1000,
        batch: int = 8,
        lr: float = 1e-2,
        model_lr: float | None = None,
        press: float = 1.0,
        temperature: float = 0.1,
        seed: int = 0,
    ) -> list[float]:
        """Train the gates so that a model's cache shrinks `ratio` times while it still predicts the next token.

        Decisions are drawn anew in each step from a Gumbel-sigmoid. The loss is the next token's cross-entropy and,
        `press` times, what is missing to the merges that the ratio asks for, as a part of all tokens, heads and layers;
        that ratio rises from 1 in the first three quarters of the steps, then stays.

        model: ours, or `contextlab.models.HuggingFaceModel`. tokens: [N, T] ids, rows without padding.
        ratio: tokens for each slot, above 1. steps: optimizer steps, each on `batch` rows drawn anew.
        lr: the gates' highest rate, after a tenth of the steps; it falls to 0 at the end.
        model_lr: None leaves the model as it is and trains the gates alone. With a rate ALL ITS WEIGHTS CHANGE, as in
            the paper; then `save` keeps the gates only, so save the model, too.
        press: weight of the missing merges in the loss; at 1 gates alone may stop short of the ratio.
        temperature: of the Gumbel-sigmoid. seed: of the draws.

        Returns the cross-entropy of each step, nats a token. Raises InputError on impossible options.
        """
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 1 < ratio < math.inf:
            raise InputError(f"ratio: expected tokens for each slot, above 1 as in 2, got {ratio!r}")
        for name, value, usual in (("temperature", temperature, "0.1"), ("press", press, "1")):
            if not value > 0:
                raise InputError(f"{name}: expected above 0, got {value!r}; the default is {usual}")
        layers, like = Recorder().layers(model), next(model.parameters())
        before, gates = self.gates, [_gate(layer, like) for layer in layers]
        groups = [{"params": [weight for gate in gates for weight in gate.parameters()], "lr": lr}]
        if model_lr is not None:
            groups.append({"params": [x for x in model.parameters() if x.requires_grad], "lr": model_lr})
        drawn = _Relaxed(torch.Generator(like.device).manual_seed(seed), temperature)

        def missing(step: int) -> Tensor:
            now = 1 + (ratio - 1) * min(1.0, (step + 1) / (0.75 * steps))
            soft = torch.stack(drawn.decisions)[..., 1:]  # the first token joins nothing
            drawn.decisions.clear()
            hard = (soft > 0.5).to(soft.dtype) - soft.detach() + soft
            every = soft[..., 0].numel() / soft.shape[1] * tokens.shape[1]
            return press * relu(1 - 1 / now - hard.sum((0, 2, 3)) / every).mean()

        self.gates, self._relaxed = gates, drawn
        try:
            with self.attach(model):
                losses = language_training(model, tokens, groups, steps=steps, batch=batch, seed=seed, more=missing)
        except BaseException:
            self.gates = before
            raise
        finally:
            self._relaxed = None
        for gate in gates:
            gate.requires_grad_(False)
        return losses

    def save(self, folder: str | Path) -> None:
        """Write the trained gates: safetensors and a JSON file. Raises InputError when untrained."""
        if not self.gates:
            raise InputError("DMC: there is nothing to save; train the gates first with policy.fit(...)")
        write_trained(Path(folder), "dmc", self.gates)

    def _load(self, folder: Path) -> None:
        layers, tensors = read_trained(folder, "dmc", "these are no gates; expected what DMC.save wrote")
        gates = []
        for i in range(layers):
            weight, bias = tensors.get(f"{i}.weight"), tensors.get(f"{i}.bias")
            if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1] or len(bias) % 2:
                raise InputError(f"{folder / 'dmc.safetensors'}: damaged: the gate of layer {i} is not complete")
            gate = nn.Linear(weight.shape[1], weight.shape[0])
            gate.load_state_dict({"weight": weight, "bias": bias}, assign=True)
            gates.append(gate.requires_grad_(False))
        self.gates = gates


def _gate(layer: KVLayer, like: Tensor) -> nn.Linear:
    """A gate that appends every token and weighs all alike, of the dtype and on the device of `like`."""
    gate = nn.Linear(layer.kv_heads * layer.value_dim, 2 * layer.kv_heads)
    nn.init.zeros_(gate.weight)
    with torch.no_grad():
        gate.bias.fill_(INITIAL_LOGIT)[: layer.kv_heads] = -INITIAL_LOGIT
    return gate.to(like.device, like.dtype)
