"""A model of transformers with the surface of our `Model`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ModelWrapValidatorHandler, model_validator
from torch import Tensor, nn

from contextlab.compat import cache_argument
from contextlab.errors import InputError
from contextlab.models.generation import generate
from contextlab.models.hub_cache import emptied, filled, places, without_rows
from contextlab.models.padding import padding
from contextlab.spec import Spec
from contextlab.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

# Types whose code in transformers (5.x) cannot do what `read` needs, found by holding them to the laws:
STEPWISE = ("mamba", "falcon_mamba", "jamba")  # continue a state by one token at a time only
ROW_BY_ROW = ("rwkv",)  # mix up the rows of a batch when they read one token
UNPADDED = ("rwkv", "xlstm")  # take no notice of padding
PIECE_MASK = ("mamba", "mamba2", "falcon_mamba")  # expect the mask of the piece that is read, not of all that was


class HuggingFaceSpec(Spec):
    """What a Hugging Face model is.

    kind: its `model_type`. config: its configuration, as `config.json` holds it.
    input_size, output_size: token ids. read_in: always "token".
    """

    kind: str
    config: dict[str, Any]
    input_size: int
    output_size: int
    read_in: Literal["token"] = "token"

    @model_validator(mode="wrap")
    @classmethod
    def _numbers(cls, data: Any, handler: ModelWrapValidatorHandler[HuggingFaceSpec]) -> HuggingFaceSpec:
        """Any numbers: configurations of transformers hold infinities, where they limit nothing."""
        return handler(data)


@dataclass
class HuggingFaceState(State):
    """What a Hugging Face model remembers: the tensors of its cache.

    leaves: the tensors that have the batch first and the states that policies left, in the order of their slots in
        `form`.
    start: [B] int64, the left-padding tokens of each row.
    form: the cache with empty slots in their places.
    padded: whether any piece came with a mask.
    """

    leaves: list[Tensor | State]
    start: Tensor
    form: Any = dataclasses.field(default=None, metadata={"static": True})
    padded: bool = dataclasses.field(default=False, metadata={"static": True})


class HuggingFaceModel(nn.Module):
    """A causal language model of `transformers` with the surface of our `Model`.

    model: for example what `AutoModelForCausalLM.from_pretrained` returns.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        self.spec = HuggingFaceSpec(
            kind=model.config.model_type,
            config=model.config.to_dict(),
            input_size=config.vocab_size,
            output_size=config.vocab_size,
        )
        known = inspect.signature(model.forward).parameters
        cache = cache_argument(model.forward)
        if cache is None:
            raise InputError(f"{self.spec.kind}: the model takes no cache, so it has no state to hand on")
        self._cache = cache
        self._knows_positions = "position_ids" in known
        self._masked = "attention_mask" in known and self.spec.kind not in UNPADDED
        self._reach: list[tuple[int, int | None]] | None = None
        self.train(model.training)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] at every position of whole sequences [B, T], keeping no state; see `Model.forward`."""
        self._check(inputs, None)
        padded = padding(mask, inputs, begun=False, waiting=None)
        inputs, mask = padded.moved(inputs), padded.mask
        given = self._masks(mask, None if mask is None else (~mask).sum(1), 0, inputs.shape[1])
        return padded.back(self.model(input_ids=inputs, use_cache=False, **given).logits)

    def read(
        self, inputs: Tensor, state: HuggingFaceState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, HuggingFaceState]:
        """Read inputs [B, T] on from `state` (None at the start) -> logits [B, T, V], state; see `Model.read`.

        The state passed in stays valid.
        """
        self._check(inputs, state)
        begun = state is not None and state.length > 0
        waiting = None if state is None or mask is None else tuple((state.start >= state.length).tolist())
        placed = padding(mask, inputs, begun, waiting)
        logits, after = self._read_on(placed.moved(inputs), state, placed.mask)
        return placed.back(logits), after

    def _read_on(
        self, inputs: Tensor, state: HuggingFaceState | None, mask: Tensor | None
    ) -> tuple[Tensor, HuggingFaceState]:
        """`read`, with padding on the left."""
        if state is not None and mask is not None and (cuts := _begins(mask)):
            return self._in_pieces(inputs, state, mask, cuts)
        if state is not None and inputs.shape[1] > 1 and self.spec.kind in STEPWISE:
            return self._stepwise(inputs, state, mask)
        if state is not None and inputs.shape == (len(inputs), 1) and len(inputs) > 1 and self.spec.kind in ROW_BY_ROW:
            return self._row_by_row(inputs, state, mask)
        length = 0 if state is None else state.length
        start = inputs.new_zeros(inputs.shape[0]) if state is None else state.start
        padded = mask is not None or (state is not None and state.padded)
        if mask is not None:
            start = start + (~mask).sum(1)
        given = self._masks(mask, start if padded else None, length, inputs.shape[1])
        if state is not None:
            given[self._cache] = filled(state.form, iter(state.leaves))
        output = self.model(input_ids=inputs, use_cache=True, **given)
        if not torch.is_grad_enabled() and not bool(output.logits.isfinite().all()):
            raise InputError(self._first_fault(inputs, given))
        if output.get(self._cache) is None:
            raise InputError(
                f"{self.spec.kind}: transformers' model does not return its cache, so it has no state to hand on"
            )
        leaves: list[Tensor | State] = []
        form = emptied(output[self._cache], inputs.shape[0], leaves)
        # Policies' states know the padding of each row, too: it is not held twice.
        starts = (getattr(x, "start", None) for x in leaves if isinstance(x, State))
        start = next((x for x in starts if isinstance(x, Tensor)), start)
        length += inputs.shape[1]
        if mask is not None and bool((waiting := start >= length).any()):
            # Not all layers of transformers heed the mask of a piece, but what padding left is no row's memory.
            leaves = [x if isinstance(x, State) else without_rows(x, waiting) for x in leaves]
        return output.logits, HuggingFaceState(leaves, start, form, padded, length=length)

    def _in_pieces(
        self, inputs: Tensor, state: HuggingFaceState, mask: Tensor, cuts: list[int]
    ) -> tuple[Tensor, HuggingFaceState]:
        """Read on with a cut wherever a row begins, so that within a piece a row is padding only or tokens only."""
        logits = []
        for first, last in pairwise([0, *cuts, inputs.shape[1]]):
            each, state = self._read_on(inputs[:, first:last], state, mask[:, first:last])
            logits.append(each)
        return torch.cat(logits, 1), state

    def recached(self, state: HuggingFaceState, change: Callable[[Any, Tensor, bool], None]) -> HuggingFaceState:
        """The state after its cache was changed in place by change(cache, start, padded); the one given stays valid.

        start: [B] int64, padding on the left of each row. padded: whether there is any.
        """
        if not isinstance(state, HuggingFaceState):
            raise InputError(f"expected the state of a Hugging Face model, got {type(state).__name__}")
        cache = filled(state.form, iter(state.leaves))
        change(cache, state.start, state.padded)
        leaves: list[Tensor | State] = []
        return dataclasses.replace(state, form=emptied(cache, len(state.start), leaves), leaves=leaves)

    @torch.no_grad()
    def _first_fault(self, inputs: Tensor, given: dict[str, Any]) -> str:
        """Where NaN or infinity first appears, in words."""
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                return f"the model's parameter {name!r} holds NaN or infinity"
        found: list[str] = []

        def look(name: str, layer: nn.Module) -> Any:
            def hook(module: nn.Module, arguments: Any, result: Any) -> None:
                hidden = result[0] if isinstance(result, tuple) else result
                if not found and isinstance(hidden, Tensor) and not bool(hidden.isfinite().all()):
                    found.append(f"layer {name!r} gives NaN or infinity")

            return layer.register_forward_hook(hook)

        layers = [(n, m) for n, m in self.model.named_modules() if re.search(r"\.(layers|h|blocks)\.\d+$", n)]
        hooks = [look(name, layer) for name, layer in layers]
        given = {key: value for key, value in given.items() if key != self._cache}  # the model may have written into it
        try:
            self.model(input_ids=inputs, use_cache=False, **(given if "attention_mask" not in given else {}))
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else "the logits hold NaN or infinity"

    def _stepwise(
        self, inputs: Tensor, state: HuggingFaceState, mask: Tensor | None
    ) -> tuple[Tensor, HuggingFaceState]:
        """Read on one token at a time, for models whose code continues a state by single tokens only."""
        logits = []
        for t in range(inputs.shape[1]):
            each, state = self._read_on(inputs[:, t : t + 1], state, None if mask is None else mask[:, t : t + 1])
            logits.append(each)
        return torch.cat(logits, 1), state

    def _row_by_row(
        self, inputs: Tensor, state: HuggingFaceState, mask: Tensor | None
    ) -> tuple[Tensor, HuggingFaceState]:
        """Read on with each row alone, for models whose code takes a single token for a batch of one only."""
        rows = torch.arange(len(inputs), device=inputs.device)
        masks = [None] * len(inputs) if mask is None else mask.split(1)
        read = [self._read_on(inputs[i : i + 1], state.select(rows[i : i + 1]), masks[i]) for i in rows.tolist()]
        parts: Any = zip(*(after.leaves for _, after in read), strict=True)
        leaves: list[Tensor | State] = [torch.cat(each) for each in parts]
        start = torch.cat([after.start for _, after in read])
        after = dataclasses.replace(read[0][1], leaves=leaves, start=start, padded=state.padded or mask is not None)
        return torch.cat([logits for logits, _ in read]), after

    def generate(
        self,
        prompt: Tensor,
        tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Continue token sequences [B, T] one token at a time from the state: [B, T + tokens]; see `Model.generate`."""
        return generate(self, prompt, tokens, temperature=temperature, generator=generator, mask=mask)

    def _masks(self, mask: Tensor | None, start: Tensor | None, before: int, read: int) -> dict[str, Any]:
        """The mask over all that was read and each token's place in its row; nothing when nothing is padded."""
        if start is None:
            return {}
        if not self._masked:
            raise InputError(f"{self.spec.kind}: transformers' model takes no padding; give rows of equal length")
        places = torch.arange(before + read, device=start.device) - start[:, None]
        real = (places >= 0).to(torch.int64)
        given: dict[str, Any] = {"attention_mask": real[:, before:] if self.spec.kind in PIECE_MASK else real}
        if self._knows_positions:
            given["position_ids"] = places[:, before:].clamp_min(0)
        return given

    def _check(self, inputs: Tensor, state: State | None) -> None:
        if inputs.ndim != 2 or inputs.is_floating_point():
            raise InputError(f"expected token ids [B, T] int64, got {inputs.dtype} {list(inputs.shape)}")
        if state is None:
            return
        if not isinstance(state, HuggingFaceState):
            raise InputError(f"expected the state of a Hugging Face model, got {type(state).__name__}")
        if len(state.start) != len(inputs):
            raise InputError(f"the state has {len(state.start)} rows, the tokens have {len(inputs)}")

    @property
    def parameter_count(self) -> int:
        """Number of trainable values (tied weights once)."""
        return sum(p.numel() for p in self.parameters())

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """The exact bytes of the state after reading `length` tokens, in the model's own dtype.

        Found by reading two tokens: what is kept for each token grows with the length up to the layer's window.
        """
        if dtype is not None and dtype != self.model.dtype:
            raise InputError(f"the state of this model is in its own dtype, {self.model.dtype}; leave dtype out")
        if self._reach is None:
            self._reach = self._measure()
        row = sum(size if reach is None else size * min(length, reach) for size, reach in self._reach)
        return batch * (row + torch.int64.itemsize)

    @torch.no_grad()
    def _measure(self) -> list[tuple[int, int | None]]:
        """(bytes, longest reach) of each tensor of the state, bytes a token; (bytes, None) when they are constant."""
        training = self.training
        _, state = self.eval().read(torch.zeros(1, 2, dtype=torch.int64, device=self.model.device))
        self.train(training)
        found: list[tuple[int, int | None]] = []
        for layer, name, tensor in places(state.form, iter(state.leaves)):
            if isinstance(tensor, State):
                raise InputError(
                    "a policy is attached, and the size depends on what it keeps; read the tokens and take state.nbytes"
                )
            size = tensor.numel() * tensor.element_size()
            if name not in ("keys", "values"):
                found.append((size, None))
            elif getattr(layer, "is_sliding", False):
                found.append((size // min(2, layer.sliding_window - 1), layer.sliding_window - 1))
            else:
                found.append((size // 2, 2**62))
        return found

    def flops(self, length: int) -> int:
        """Multiply-adds x 2 of one forward over one sequence: linear layers and the attention pairs in sight.

        The recurrences' own operations, small beside them, are not counted.
        """
        if self._reach is None:
            self._reach = self._measure()
        weights = sum(
            module.weight.numel()
            for module in self.model.modules()
            if isinstance(module, nn.Linear | nn.Conv1d) or type(module).__name__ == "Conv1D"
        )
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)
        shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
        pairs = 0
        for size, reach in self._reach:
            if reach is not None:
                seen = min(length, reach + (reach < 2**62))  # the token itself beside the ones held
                pairs += size // self.model.dtype.itemsize * (seen * (seen + 1) // 2 + (length - seen) * seen)
        return 2 * length * weights + 2 * shared * pairs


def _begins(mask: Tensor) -> list[int]:
    """Places within a left-padded piece, mask [B, T], at which a row begins, in order."""
    at = (~mask).sum(1)
    return sorted(set(at[(at > 0) & (at < mask.shape[1])].tolist()))
