"""The stack: read-in, blocks of mixer + MLP, read-out. Read it from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.mixers.layers import Linear, multiplications
from contextlab.models.blocks import make_blocks, make_norm, share_atoms
from contextlab.models.drafting import DraftSpec, generate_drafted
from contextlab.models.exits import Exits
from contextlab.models.faults import finite, first_fault
from contextlab.models.forms import EmptyForms, place_forms
from contextlab.models.generation import generate
from contextlab.models.head import PooledHead
from contextlab.models.packing import by_document, of_row, packed, unwatched
from contextlab.models.padding import padding
from contextlab.models.spec import ModelSpec
from contextlab.models.within import Within as Within
from contextlab.models.within import some_rows
from contextlab.ops.position import sinusoidal
from contextlab.state import RecurrentState, State


@dataclass
class ModelState(State):
    """What a model remembers: one state a mixer and loop, in order of use.

    layers: the mixers' states, loop by loop.
    start: [B] int64, the padding tokens of each row; only where the spec `counts_padding`, else None.
    waiting: for each row, whether it was padding only so far; None where every row has had a token.
    """

    layers: list[State] = field(default_factory=list)
    start: Tensor | None = None
    waiting: tuple[bool, ...] | None = field(default=None, metadata={"static": True})

    def select(self, rows: Tensor) -> ModelState:
        """See `State.select`."""
        chosen = super().select(rows)
        if self.waiting is not None:
            waiting = tuple(self.waiting[row] for row in rows.tolist())
            chosen.waiting = waiting if any(waiting) else None
        return chosen


class Model(nn.Module):
    """A sequence model built from a ModelSpec.

    spec: the description; `input_size` and `output_size` must be set.
    empty_forms: leave the forms of `spec.linear` empty, for a file to be loaded; else they are those nearest to the
        dense layers that are drawn.
    """

    # Told of each reading: how many tokens stand before it, and the number of the first layer that is read.
    heard: Callable[[int, int], None] | None = None

    def __init__(self, spec: ModelSpec, empty_forms: bool = False) -> None:
        super().__init__()
        spec = spec.made
        if spec.input_size is None or spec.output_size is None:
            raise InputError("input_size and output_size must be set; ModelSpec.for_task(task) sets them")
        self.spec = spec
        self.read_in: nn.Module
        if spec.read_in == "token":
            self.read_in = nn.Embedding(spec.input_size, spec.width)
            nn.init.normal_(self.read_in.weight, std=spec.width**-0.5 if spec.tied else 1.0)
        else:
            self.read_in = Linear(spec.input_size, spec.width, bias=True)
        self.positions = None
        if spec.position == "learned":
            self.positions = nn.Embedding(spec.max_length or 0, spec.width)
            nn.init.normal_(self.positions.weight, std=0.02)
        # Shared atoms take the projections of attention away again, once all blocks are made.
        at_once = empty_forms and spec.linear and spec.atoms is None
        self.blocks = make_blocks(spec, EmptyForms(spec.linear) if at_once else None)
        self.atoms = share_atoms(spec, self.blocks)
        self._sources = spec.sources()
        self._read_above = {source for i, source in enumerate(self._sources) if source != i}
        # How to call every `recompute_every`-th block so that its activations are made again in the backward pass.
        self.recompute: Callable[..., Any] | None = None
        self.recompute_every = 1
        self.read_out_norm = make_norm(spec, spec.width)
        self.read_out: nn.Module
        if spec.pool is not None:
            self.read_out = PooledHead(spec.width, spec.output_size, spec.pool)
        else:
            self.read_out = Linear(spec.width, spec.output_size, bias=spec.read_out_bias and not spec.tied)
        with torch.no_grad():
            # Residual branches start small, so that the stack starts near the identity at any depth (GPT-2's rule).
            small = 1.0 if spec.residual == "none" else (2 * spec.depth * spec.loops) ** -0.5
            for name, parameter in self.blocks.named_parameters():
                if name.endswith("out_proj.weight"):
                    parameter.mul_(small)
            if self.atoms is not None:
                self.atoms.out.mul_(small)
        if spec.tied:
            self.read_out.weight = self.read_in.weight
        place_forms(self, empty_forms)

    def forward(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        within: Within | None = None,
    ) -> Tensor:
        """Predict at every position of whole sequences, keeping no state.

        inputs: [B, T, input_size] float, or [B, T] int64. mask: [B, T] bool, False at padding, which stands at the left
            or at the right of a row; what is predicted there means nothing. within: see `Within`.
        cu_seqlens: [N + 1] integers where the one row, [1, T], holds N documents, document i from cu_seqlens[i] up to
            cu_seqlens[i + 1]: each is answered as if it stood alone, forward and backward.
        position_ids: [B, T] integers that begin again at 0 where a document begins; they say the same.
            Terms that layers add to the gradient in training (balance of experts) are means over the batches that
            documents are read in (`ops.documents`).
        Returns [B, T, output_size]; from a pooled read-out [B, output_size], or of documents [N, output_size].
        """
        if cu_seqlens is not None or position_ids is not None:
            self._check(inputs)
            documents = packed(inputs, mask, cu_seqlens, position_ids)
            if documents is not None:
                unwatched(self)
                return by_document(self, inputs, documents, within)
        return self._run(inputs, None, mask, keep_state=False, within=within)[0]

    def read(
        self,
        inputs: Tensor,
        state: ModelState | None = None,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        within: Within | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Read inputs [B, T] or [B, T, d] on from `state` (None at the start).

        mask: [B, T] bool, False at padding: at the left of a row, or at the right of one that is read from the start;
            each row then goes on from its own last token. within: see `Within`; not of documents.
        cu_seqlens: [N + 1] integers, as for `forward`, without a state and a mask; the state has a row for each
            document, and each goes on from its own last token.
        Returns the predictions [B, T, k] and the state.
        """
        if cu_seqlens is None:
            return self._read(inputs, state, mask, within=within)
        if within is not None:
            raise InputError("within: not for packed documents; give them as rows of a batch")
        if state is not None:
            raise InputError("cu_seqlens: packed documents are read from the start; leave out the state, or cu_seqlens")
        self._check(inputs)
        documents = of_row(cu_seqlens, inputs, mask)
        unwatched(self)
        batch = documents.rows("left")
        prediction, after = self._read(batch.of(inputs), None, batch.mask)
        return documents.back([batch], [prediction]), after

    def _read(
        self,
        inputs: Tensor,
        state: ModelState | None,
        mask: Tensor | None,
        positions: Tensor | None = None,
        within: Within | None = None,
    ) -> tuple[Tensor, ModelState]:
        """positions: [B, T] int64, absolute ones where they do not follow from the place in what was read."""
        self._check_state(state)
        prediction, after = self._run(inputs, state, mask, keep_state=True, positions=positions, within=within)
        assert after is not None
        if not torch.is_grad_enabled() and not finite(prediction):
            raise InputError(first_fault(self, inputs, state, mask))
        return prediction, after

    def generate(
        self,
        prompt: Tensor,
        tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
        draft: DraftSpec | Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Continue token sequences from the state, one token at a time, or several where the model drafts for itself.

        prompt: [B, T] int64, T >= 1. tokens: how many to add. temperature: 0 takes the likeliest.
        generator: needed when temperature > 0. mask: [B, T] bool, False at padding, left or right of a row's tokens.
        draft: a `DraftSpec` or its keys, {"layers": 2}: the same tokens from fewer readings of all layers, at
            temperature 0; see `models.drafting.generate_drafted`, which also tells how many.
        Returns [B, tokens] int64.
        """
        if draft is not None:
            if temperature > 0:
                raise InputError("generate: drafted tokens are the likeliest ones; leave out draft, or temperature")
            return generate_drafted(self, prompt, tokens, draft, mask=mask).tokens
        if self.spec.read_in != "token":
            raise InputError("generate: this model reads vectors; only a model that reads tokens can generate")
        return generate(self, prompt, tokens, temperature=temperature, generator=generator, mask=mask)

    def _run(
        self,
        inputs: Tensor,
        state: ModelState | None,
        mask: Tensor | None,
        keep_state: bool,
        positions: Tensor | None = None,
        within: Within | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        self._check(inputs)
        if self.heard is not None:
            self.heard(0 if state is None else state.length, 0 if within is None else within.begin)
        spec, within = self.spec, Within() if within is None else within
        padded = padding(mask, inputs, state is not None and state.length > 0, state.waiting if state else None)
        inputs, mask = padded.moved(inputs), padded.mask
        embedded = self.read_in(inputs) if within.embedded is None else padded.moved(within.embedded)
        start = state.start if state is not None else None
        read = state.length if state is not None else 0
        if spec.position in ("learned", "sinusoidal"):
            embedded, start = self._add_positions(embedded, read, start, mask, positions)
        elif spec.counts_padding:
            start = _started(embedded, start, mask)
        exits = self._exits(embedded, read, start, mask)
        tokens = inputs if spec.read_in == "token" and within.embedded is None else None
        within.seen(embedded, padded)
        x = embedded if within.stream is None else within.stream
        count, total = len(self.blocks), len(self.blocks) * spec.loops
        states: list[Any] = [None] * total if state is None else list(state.layers)
        made: dict[int, State] = {}  # the states that later layers read the keys and values of
        # Not while somebody looks: what is made again in the backward pass would go past what was put in.
        made_again = self.recompute is not None and self.training and not keep_state and self.heard is None
        for number in range(within.begin, total if within.end is None else within.end):
            loop, i = divmod(number, count)
            block: Any = self.blocks[i]
            before = states[number]
            if not i:
                made = {}
                if loop and spec.input_injection:
                    x = x + embedded if exits is None else exits.kept(x, x + embedded)
            elif number == within.begin and state is not None:
                made = {source: states[number - i + source] for source in self._read_above if source < i}
            given = x
            if within.given is not None:
                within.given.append(x)
            if exits is not None and exits.all_gone:
                after = self._written(i, x, before, mask, keep_state, embedded, tokens)
            elif block.reads_shared:
                x, _ = block(x, made[self._sources[i]], mask, False, embedded, tokens)
                after = RecurrentState(length=read + inputs.shape[1])  # it keeps nothing of its own
            elif i in self._read_above:
                x, after = block(x, before, mask, True, embedded, tokens)
                made[i] = after
            elif within.dropped is not None and not keep_state:
                x, after = some_rows(block, within.dropped[number], x, mask, embedded, tokens), None
            elif made_again and i % self.recompute_every == 0:
                assert self.recompute is not None
                x, after = self.recompute(block, x, before, mask, keep_state, embedded, tokens)
            else:
                x, after = block(x, before, mask, keep_state, embedded, tokens)
            if exits is not None:
                x = exits.passed(given, x, lambda y: self.read_out(self.read_out_norm(y)))
            within.seen(x, padded)
            within.answered(number, x, lambda y: self.read_out(padded.back(self.read_out_norm(y))))
            if keep_state:
                states[number] = after
        if within.given is not None:
            within.given.append(x)
        if exits is not None and within.used is not None:
            within.used.append(padded.back(exits.used))
        x = self.read_out_norm(x)
        pooled = isinstance(self.read_out, PooledHead)
        if pooled:
            prediction = self.read_out(x, mask)
        else:
            x = padded.back(x)
            if within.hidden is not None:
                within.hidden[-1] = x
            prediction = self.read_out(x if within.last is None else x[:, within.last])
        if not keep_state:
            return prediction, None
        length = read + inputs.shape[1]
        return prediction, ModelState(layers=states, start=start, waiting=padded.waiting, length=length)

    def _exits(self, x: Tensor, read: int, start: Tensor | None, mask: Tensor | None) -> Exits | None:
        """Which tokens x [B, T, D] leave early; None where all go through all layers, as they do in training."""
        if self.spec.exit is None or self.training:
            return None
        places = (read + torch.arange(x.shape[1], device=x.device)).expand(x.shape[:2])
        if start is not None:
            places = places - start[:, None]
        return Exits(self.spec.exit, len(self.blocks) * self.spec.loops, mask, places)

    def _written(
        self,
        i: int,
        x: Tensor,
        before: State | None,
        mask: Tensor | None,
        keep_state: bool,
        embedded: Tensor,
        tokens: Tensor | None,
    ) -> Any:
        """The state of a block after tokens x [B, T, D] of which nothing else is asked."""
        if not keep_state:
            return None
        block: Any = self.blocks[i]
        if block.reads_shared:
            return RecurrentState(length=x.shape[1] + (0 if before is None else before.length))
        return block.remember(x, before, mask, embedded, tokens)

    def _add_positions(
        self, x: Tensor, read: int, start: Tensor | None, mask: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        start = _started(x, start, mask)
        if positions is None:
            positions = (read + torch.arange(x.shape[1], device=x.device) - start[:, None]).clamp_min(0)
        if self.positions is None:
            return x + sinusoidal(positions, self.spec.width, dtype=x.dtype), start
        longest = self.spec.max_length or 0
        if read + x.shape[1] > longest:
            raise InputError(f"a sequence of {read + x.shape[1]} tokens does not fit max_length {longest}")
        return x + self.positions(positions), start

    def _check_state(self, state: Any) -> None:
        if self.spec.pool is not None:
            raise InputError("read: a model with a pooled read-out answers whole sequences; call it on them")
        if state is None:
            for i, block in enumerate(self.blocks):
                if not block.mixer.causal:  # type: ignore[union-attr]
                    name = type(block.mixer).__name__
                    raise InputError(
                        f"read: block {i} ({name}) reads both ways, so the model has no state to hand on; call the "
                        "model on whole sequences"
                    )
            return
        wanted = len(self.blocks) * self.spec.loops
        if not isinstance(state, ModelState) or len(state.layers) != wanted:
            what = f"one of {len(state.layers)}" if isinstance(state, ModelState) else type(state).__name__
            raise InputError(f"read: the state of another model: expected a ModelState of {wanted} layers, got {what}")

    def _check(self, inputs: Tensor) -> None:
        if self.spec.read_in == "token":
            if inputs.ndim != 2 or inputs.is_floating_point():
                raise InputError(f"expected token ids [B, T] int64, got {inputs.dtype} {list(inputs.shape)}")
        elif inputs.ndim != 3 or inputs.shape[-1] != self.spec.input_size:
            raise InputError(f"expected vectors [B, T, {self.spec.input_size}], got {list(inputs.shape)}")

    @property
    def trains_alone(self) -> str:
        """Why several such models cannot be called as one; "": they can."""
        return "" if self.spec.exit is None else "which layers a token goes through depends on the data"

    @property
    def parameter_count(self) -> int:
        """Number of trainable values (tied weights once)."""
        return sum(p.numel() for p in self.parameters())

    @property
    def weight_nbytes(self) -> int:
        """Bytes of what a saved model holds: parameters and buffers, packed codes among them (tied weights once)."""
        held = {id(tensor): tensor for tensor in self.state_dict(keep_vars=True).values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """The exact bytes of the state after `length` tokens; the most that they can be where `state_varies`."""
        mixers = sum(block.state_nbytes(length, batch, dtype) for block in self.blocks)  # type: ignore[operator]
        starts = batch * 8 if self.spec.counts_padding else 0
        return mixers * self.spec.loops + starts

    @property
    def state_varies(self) -> bool:
        """Whether the tokens decide how large the state is, as they do in a layer that some of them skip."""
        return any(block.router is not None for block in self.blocks)

    def flops(self, length: int) -> int:
        """Multiply-adds x 2 of one forward over one sequence of `length` tokens (matrix products counted).

        Those of all layers, whether tokens leave early or not; how sure the model is of them is counted beside.
        """
        total = sum(block.flops(length) for block in self.blocks)  # type: ignore[operator]
        if isinstance(self.read_out, PooledHead):
            each = 0 if self.read_out.attention is None else 2 * self.read_out.attention.heads * self.spec.width
            ends = 2 * self.read_out.matrices() + 2 * length * each
        else:
            ends = 2 * length * multiplications(self.read_out)
        if self.spec.read_in == "vector":
            ends += 2 * length * (self.spec.input_size or 0) * self.spec.width
        if self.spec.exit is not None and self.spec.exit.by == "softmax":
            looks = len(self.blocks) * self.spec.loops - self.spec.exit.first
            ends += looks * 2 * length * multiplications(self.read_out)
        return total * self.spec.loops + ends


def _started(x: Tensor, start: Tensor | None, mask: Tensor | None) -> Tensor:
    """[B] int64, the padding tokens of each row so far. start: of those before x [B, T, D]."""
    if start is None:
        start = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return start if mask is None else start + (~mask).sum(1)
