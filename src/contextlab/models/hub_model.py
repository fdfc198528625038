"""A model of transformers with the surface of our `Model`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from contextlab.compat import cache_argument
from contextlab.errors import InputError
from contextlab.models.generation import generate
from contextlab.models.hub_cache import Growth, Place, emptied, filled, grown, places, products, without_rows
from contextlab.models.hub_faults import first_fault
from contextlab.models.hub_pieces import warn_of_pieces
from contextlab.models.hub_rows import (
    begins,
    heeds_padding,
    in_pieces,
    length_matters,
    makes_places,
    read_ragged,
    row_by_row,
)
from contextlab.models.hub_state import HuggingFaceSpec, HuggingFaceState, RaggedState
from contextlab.models.packing import of_row, packed, unwatched
from contextlab.models.padding import Padding, padding, tokens_first
from contextlab.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

# Types whose code in transformers (5.x) cannot do what `read` needs, found by holding them to the laws:
STEPWISE = ("mamba", "falcon_mamba", "jamba", "prophetnet")  # continue a state by one token at a time only
ROW_BY_ROW = ("rwkv",)  # mix up the rows of a batch when they read one token
NO_STATE = {
    "cpmant": "the model reads both ways",
    "blt": "its patches have a cache of their own, which transformers cannot make",
    "musicgen_decoder": "it reads several codebooks at each place, not one token",
    "musicgen_melody_decoder": "it reads several codebooks at each place, not one token",
}  # have nothing that a state could be made of
PIECE_MASK = ("mamba", "mamba2", "falcon_mamba")  # expect the mask of the piece that is read, not of all that was


class HuggingFaceModel(nn.Module):
    """A causal language model of `transformers` with the surface of our `Model`.

    model: for example what `AutoModelForCausalLM.from_pretrained` returns.
    """

    # Told of each reading: how many tokens stand before it, and the number of the first layer that is read.
    heard: Callable[[int, int], None] | None = None

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
        if why := NO_STATE.get(self.spec.kind):
            raise InputError(f"{self.spec.kind}: {why}, so there is no state to hand on")
        deep, cached = getattr(config, "decoder_layers", None), getattr(config, "num_hidden_layers", None)
        if isinstance(deep, int) and isinstance(cached, int) and deep > cached:
            raise InputError(
                f"{self.spec.kind}: its decoder has {deep} layers, but transformers makes a cache of {cached} (as the "
                "encoder has), so there is no state to hand on; set encoder_layers to as many"
            )
        known = inspect.signature(model.forward).parameters
        cache = cache_argument(model.forward)
        if cache is None:
            raise InputError(f"{self.spec.kind}: the model takes no cache, so it has no state to hand on")
        self._cache = cache
        self._knows_positions = "position_ids" in known and not makes_places(model)
        self._heeds_padding = heeds_padding(model, set(known)) and not length_matters(model.config)
        if getattr(config, "is_decoder", None) is False and not self._causal():
            raise InputError(
                f"{self.spec.kind}: the model reads both ways, so it has no state to hand on; expected a configuration "
                "with is_decoder=True"
            )
        self._grown: list[tuple[Place, Growth]] | None = None
        self._told = False  # whether it was said how answers in pieces differ
        self.train(model.training)

    @torch.no_grad()
    def _causal(self) -> bool:
        """Whether the first of two tokens is answered alike whatever the second is."""
        training = self.model.training
        pair = torch.tensor([[0, 0], [0, 1]], device=self.model.device)
        first = self.model.eval()(input_ids=pair, use_cache=False).logits[:, 0]
        self.model.train(training)
        return bool(torch.isclose(first[0], first[1], rtol=1e-3, atol=1e-5).all())

    def forward(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] at every position of whole sequences [B, T], keeping no state; see `Model.forward`."""
        self._check(inputs, None)
        if cu_seqlens is not None or position_ids is not None:
            documents = packed(inputs, mask, cu_seqlens, position_ids)
            if documents is not None:
                unwatched(self)
                batches = documents.batches("right")
                return documents.back(batches, [self._answer(each.of(inputs), each.mask) for each in batches])
        return self._answer(inputs, mask)

    def _answer(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """`forward`, of rows."""
        placed = padding(mask, inputs, begun=False, waiting=None)
        if mask is None or placed.mask is None:
            return self.model(input_ids=inputs, use_cache=False).logits
        longest = int(mask.sum(1).amax())
        policy = any(getattr(module, "served", None) is not None for module in self.model.modules())
        if policy or length_matters(self.model.config, longest):
            return placed.back(self._without_state(placed.moved(inputs), placed.mask))
        # No token of a row looks at what stands behind it, so padding there needs no mask, and places are right.
        moved = tokens_first(mask)
        logits = self.model(input_ids=moved.moved(inputs)[:, : max(longest, 1)], use_cache=False).logits
        return moved.back(nn.functional.pad(logits, (0, 0, 0, inputs.shape[1] - logits.shape[1])))

    def _without_state(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """`forward` where padding behind a row would be taken for its tokens, as policies do; it stands on the left."""
        if self._together():
            given = self._masks(mask, (~mask).sum(1), 0, *inputs.shape)
            return self.model(input_ids=inputs, use_cache=False, **given).logits

        def read(inputs: Tensor, state: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]:
            return self.model(input_ids=inputs, use_cache=False).logits, state

        return read_ragged(read, inputs, None, mask.sum(1), self._blank)[0]

    @property
    def _blank(self) -> Tensor:
        """What is answered where nothing is read, [1, 1, V]."""
        return torch.zeros(1, 1, self.spec.output_size, dtype=self.model.dtype, device=self.model.device)

    def _together(self) -> bool:
        """Whether rows of unequal length are read in one batch with a mask, else those of equal length together."""
        # Written-out attention masks float64 scores by the least float64, which its softmax in float32 takes for -inf.
        exact = self.model.dtype == torch.float64 and self.model.config._attn_implementation == "eager"
        return self._heeds_padding and not exact

    def read(
        self,
        inputs: Tensor,
        state: HuggingFaceState | RaggedState | None = None,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, HuggingFaceState | RaggedState]:
        """Read inputs [B, T] on from `state` (None at the start) -> logits [B, T, V], state; see `Model.read`.

        The state passed in stays valid. Where transformers' code answers pieces unlike the whole, this is said once as
        a warning (`contextlab.models.hub_pieces`).
        """
        self._check(inputs, state)
        if cu_seqlens is not None:
            if state is not None:
                raise InputError(
                    "cu_seqlens: packed documents are read from the start; leave out the state, or cu_seqlens"
                )
            documents = of_row(cu_seqlens, inputs, mask)
            unwatched(self)
            batch = documents.rows("left")
            logits, after = self.read(batch.of(inputs), None, batch.mask)
            return documents.back([batch], [logits]), after
        begun = state is not None and state.length > 0
        if begun and state is not None and not self._told:
            text = self.model.config.get_text_config()
            self._told = warn_of_pieces(self.spec.kind, text, state.length + inputs.shape[1])
        waiting = None if state is None or mask is None else tuple((state.start >= state.length).tolist())
        placed = padding(mask, inputs, begun, waiting)
        logits, after = self._read(placed.moved(inputs), state, placed)
        return placed.back(logits), after

    def _read(
        self, inputs: Tensor, state: HuggingFaceState | RaggedState | None, placed: Padding
    ) -> tuple[Tensor, HuggingFaceState | RaggedState]:
        """`read`, with padding on the left."""
        mask = placed.mask
        if isinstance(state, HuggingFaceState):
            return self._read_on(inputs, state, mask)
        if state is None and (mask is None or self._together()):
            return self._read_on(inputs, None, mask)
        if state is None and mask is not None and bool(mask.all()):
            return self._read_on(inputs, None)
        real = inputs.new_full((len(inputs),), inputs.shape[1]) if mask is None else mask.sum(1)
        return read_ragged(self._read_on, inputs, state, real, self._blank)

    def _read_on(
        self, inputs: Tensor, state: HuggingFaceState | None, mask: Tensor | None = None
    ) -> tuple[Tensor, HuggingFaceState]:
        """`read`, with padding on the left that the model heeds."""
        if state is not None:
            if mask is not None and (cuts := begins(mask)):
                return in_pieces(self._read_on, inputs, state, mask, cuts)
            if inputs.shape[1] > 1 and self.spec.kind in STEPWISE:
                return in_pieces(self._read_on, inputs, state, mask, list(range(1, inputs.shape[1])))
            if inputs.shape[1] == 1 and len(inputs) > 1 and self.spec.kind in ROW_BY_ROW:
                return row_by_row(self._read_on, inputs, state, mask)
        length = 0 if state is None else state.length
        start = inputs.new_zeros(inputs.shape[0]) if state is None else state.start
        padded = mask is not None or (state is not None and state.padded)
        if mask is not None:
            start = start + (~mask).sum(1)
        given = self._masks(mask, start if padded else None, length, *inputs.shape)
        if state is not None:
            given[self._cache] = filled(state.form, state.leaves)
        output = self.model(input_ids=inputs, use_cache=True, **given)
        if not torch.is_grad_enabled() and not bool(output.logits.isfinite().all()):
            given.pop(self._cache, None)  # the model may have written into it
            raise InputError(first_fault(self.model, inputs, given))
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

    def recached(
        self, state: HuggingFaceState | RaggedState, change: Callable[[Any, Tensor, bool], None]
    ) -> HuggingFaceState | RaggedState:
        """The state after its cache was changed in place by change(cache, start, padded); the one given stays valid.

        start: [B] int64, padding on the left of each row. padded: whether there is any. Called for each part of a
        `RaggedState`.
        """
        if isinstance(state, RaggedState):
            return state.mapped(lambda part: self._recached(part, change))
        if not isinstance(state, HuggingFaceState):
            raise InputError(f"expected the state of a Hugging Face model, got {type(state).__name__}")
        return self._recached(state, change)

    def _recached(self, state: HuggingFaceState, change: Callable[[Any, Tensor, bool], None]) -> HuggingFaceState:
        cache = filled(state.form, state.leaves)
        change(cache, state.start, state.padded)
        leaves: list[Tensor | State] = []
        return dataclasses.replace(state, form=emptied(cache, len(state.start), leaves), leaves=leaves)

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

    def _masks(self, mask: Tensor | None, start: Tensor | None, before: int, batch: int, read: int) -> dict[str, Any]:
        """The mask over all that was read and each token's place in its row; nothing when nothing is padded."""
        if start is None:
            # Some models count from 0 in every piece (Bamba does), unless they are told.
            if not self._knows_positions or not before:
                return {}
            place = torch.arange(before, before + read, device=self.model.device)
            return {"position_ids": place.expand(batch, -1)}
        places = torch.arange(before + read, device=start.device) - start[:, None]
        real = (places >= 0).to(torch.int64)
        given: dict[str, Any] = {"attention_mask": real[:, before:] if self.spec.kind in PIECE_MASK else real}
        if self._knows_positions:
            given["position_ids"] = places[:, before:].clamp_min(0)
        return given

    def _check(self, inputs: Tensor, state: State | None) -> None:
        if inputs.ndim != 2 or inputs.is_floating_point():
            raise InputError(f"expected token ids [B, T] int64, got {inputs.dtype} {list(inputs.shape)}")
        if self.heard is not None:
            self.heard(0 if state is None else state.length, 0)
        if state is None:
            return
        if not isinstance(state, HuggingFaceState | RaggedState):
            raise InputError(f"expected the state of a Hugging Face model, got {type(state).__name__}")
        if len(state.start) != len(inputs):
            raise InputError(f"the state has {len(state.start)} rows, the tokens have {len(inputs)}")

    @property
    def parameter_count(self) -> int:
        """Number of trainable values (tied weights once)."""
        return sum(p.numel() for p in self.parameters())

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """The exact bytes of the state after reading `length` tokens, in the model's own dtype.

        Found by reading a few tokens, three times at least: of each tensor of the cache, whether it grows with every
        token, up to the layer's window, with every block that is complete, or not. Raises InputError where it does
        none of these.
        """
        if dtype is not None and dtype != self.model.dtype:
            raise InputError(f"the state of this model is in its own dtype, {self.model.dtype}; leave dtype out")
        row = sum(rule.nbytes(length) for _, rule in self._growth())
        return batch * (row + torch.int64.itemsize)

    def _growth(self) -> list[tuple[Place, Growth]]:
        """The tensors of the state, and how each grows."""
        if self._grown is None:
            self._grown = grown(self._sizes, self.spec.kind)
        return self._grown

    @torch.no_grad()
    def _sizes(self, length: int) -> list[tuple[Place, int]]:
        """The tensors of the state after so many tokens, and their bytes."""
        training = self.training
        _, state = self.eval()._read_on(torch.zeros(1, length, dtype=torch.int64, device=self.model.device), None)
        self.train(training)
        found = []
        for index, place in dict(reversed(list(places(state.form)))).items():
            tensor = state.leaves[index]
            if isinstance(tensor, State):
                raise InputError(
                    "a policy is attached, and the size depends on what it keeps; read the tokens and take state.nbytes"
                )
            found.append((place, tensor.numel() * tensor.element_size()))
        return found

    def flops(self, length: int) -> int:
        """Multiply-adds x 2 of one forward over one sequence: linear layers and the attention pairs in sight.

        The recurrences' own operations, small beside them, are not counted. Where an indexer chooses what is read, its
        own products are, and attention is that over all tokens, as transformers computes it.
        """
        weights = sum(
            module.weight.numel()
            for module in self.model.modules()
            if isinstance(module, nn.Linear | nn.Conv1d) or type(module).__name__ == "Conv1D"
        )
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)
        shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
        seen = products(self._growth(), length, shared, heads, getattr(config, "index_n_heads", 1))
        return 2 * length * weights + 2 * (seen // self.model.dtype.itemsize)
