"""The Mixer contract: an `nn.Module` that mixes tokens, `(x, state) -> (y, state)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from contextlab.errors import InputError, nearest_divisor
from contextlab.mixers.sites import Sited
from contextlab.ops.documents import Documents, Side, documents
from contextlab.state import RecurrentState, State


class Mixer(Sited, ABC):
    """Base of every token mixer.

    width: D, the size of a token's vector.
    """

    causal: ClassVar[bool] = True
    # How a whole sequence is computed at once: "attention", "chunks" of matrix products, "scan", "convolution",
    # "Fourier transform", "pooling", a "loop" over tokens, chunks or segments.
    parallel_form: ClassVar[str] = "?"
    reads_tokens: ClassVar[bool] = False  # whether `forward` also takes the token ids
    hard_choices: ClassVar[bool] = False  # whether it picks what it reads, so that half precision may pick otherwise
    amplifies_rounding: ClassVar[bool] = False  # whether what it wrote decides what it writes, and last digits grow
    tells_mixing: ClassVar[bool] = False  # whether `mixing` gives the matrices by which it mixes tokens
    trains_alone: ClassVar[str] = ""  # why several cannot be trained as one program (`training.ensemble`); "": they can

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"width must be at least 1, got {width}")
        self.width = width
        self._expected: Signature | None = None

    def __call__(
        self,
        x: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        keep_state: bool = True,
        tokens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """Check what is given, then `forward`. Raises InputError on a state of another mixer or batch.

        tokens: [B, T] int64, the ids that x was made of, for a mixer that `reads_tokens`.
        cu_seqlens: [N + 1] integers where x [1, T, D] holds N documents one after the other: each is answered as if it
            stood alone, and the state has a row for each. With keep_state=False documents of like length are read
            together (`ops.documents`), so that padding takes no more than the tokens do; without a state and a mask.
        """
        self._check(x, state, mask)
        given: tuple[Tensor, ...] = ()
        if self.reads_tokens:
            if tokens is None or tokens.shape != x.shape[:2]:
                found = "none" if tokens is None else list(tokens.shape)
                raise InputError(
                    f"{type(self).__name__} reads token ids: expected tokens {list(x.shape[:2])}, got {found}"
                )
            given = (tokens,)
        if cu_seqlens is not None:
            if state is not None or mask is not None:
                what = "a state" if state is not None else "a mask"
                raise InputError(f"cu_seqlens: packed documents are read whole, without {what}; leave it out")
            return self._by_document(x, keep_state, given, documents(cu_seqlens, x))
        y, after = self._checked(super().__call__(x, state, mask, keep_state, *given))
        if after is not None:
            after.__dict__["_left_by"] = id(self)  # spares the check of a state that comes straight back
        return y, after

    def remember(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> State | None:
        """The state after tokens x [B, T, D] whose outputs are not asked for; arguments as of a call.

        A mixer whose state is made with less work than its outputs does this work alone.
        """
        return self(x, state, mask, True, tokens)[1]

    @property
    def reads_forward(self) -> bool:
        """Whether padding on the right of a row changes no answer: it is causal, and no policy is attached."""
        return self.causal and getattr(self, "served", None) is None

    def _checked(self, answer: object) -> tuple[Tensor, State | None]:
        """What `forward` returned, where it is y and a state or None. Raises InputError where it is not."""
        pair = answer if isinstance(answer, tuple) and len(answer) == 2 else None
        if pair is not None and isinstance(pair[0], Tensor) and (pair[1] is None or isinstance(pair[1], State)):
            return pair
        found = ", ".join(type(each).__name__ for each in answer) if isinstance(answer, tuple) else None
        raise InputError(
            f"{type(self).__name__}.forward: expected it to return (y, state), a Tensor and a State or None, "
            f"got {type(answer).__name__ if found is None else f'({found})'}"
        )

    def _by_document(
        self, x: Tensor, keep_state: bool, tokens: tuple[Tensor, ...], packed: Documents
    ) -> tuple[Tensor, State | None]:
        """Each document as a row of a batch; what a causal mixer answers does not depend on padding on the right."""
        kept = keep_state and self.causal
        aside: Side = "right" if self.reads_forward and not kept else "left"
        batches = [packed.rows(aside)] if kept else packed.batches(aside)
        answers, after = [], None
        for batch in batches:
            ids = (batch.of(each) for each in tokens)
            y, after = self(batch.of(x), None, batch.mask if aside == "left" else None, kept, *ids)
            answers.append(y)
        return packed.back(batches, answers), after

    def _check(self, x: Tensor, state: State | None, mask: Tensor | None) -> None:
        name = type(self).__name__
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise InputError(f"{name}: expected x [B, T, {self.width}], got {list(x.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise InputError(
                f"{name}: expected mask bool {list(x.shape[:2])}, got {str(mask.dtype)[6:]} {list(mask.shape)}"
            )
        if state is None:
            return
        if not self.causal:
            raise InputError(f"{name} reads both ways and takes no state; give it the whole sequence at once")
        if state.__dict__.get("_left_by") != id(self) and getattr(self, "served", None) is None:
            if self._expected is None:
                self._expected = _signature(self, x)
            self._expected.check(state, name)
        first = next(state.tensors(), x)
        if len(first) != len(x):
            raise InputError(f"{name}: the state has {len(first)} rows, x has {len(x)}")

    @abstractmethod
    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """Read tokens.

        x: [B, T, D]. state: what was read before, None at the start.
        mask: [B, T] bool or None; False marks left padding. In the whole sequence (earlier pieces included) no
            padding may follow a real token. Padded tokens change nothing; what is returned at them is undefined
            but finite.
        keep_state: False says that the caller drops the state, so that its cost can be saved; None is then returned.

        Returns y [B, T, D] and the state after the last token. The state passed in stays valid (it can be used
        again, as in beam search), and an input state that requires gradients is differentiated through.
        """

    def mixing(self, x: Tensor) -> Tensor:
        """The matrices by which values are mixed, [B, H, T, T]: o_t = sum_j M[t, j] v_j in each head.

        x: [B, T, D], a whole text. They are what place "heads" answers where the values at place "v" are the rows of a
        unit matrix, in which that answer is linear. Of mixers that declare `tells_mixing`; others raise InputError.
        """
        if not self.tells_mixing:
            raise InputError(f"{type(self).__name__} does not tell by which matrices it mixes tokens")

        def units(name: str, value: Tensor) -> Tensor:
            if name == "heads":
                raise _Answered(value)
            if name != "v":
                return value
            return torch.eye(x.shape[1], dtype=value.dtype, device=x.device)[:, None].expand(*value.shape[:3], -1)

        before, self.tap = self.tap, units
        try:
            self(x, None, None, False)
        except _Answered as answer:
            return answer.heads.transpose(1, 2)
        finally:
            self.tap = before
        raise InputError(f"{type(self).__name__} declares tells_mixing, but has no place called heads")

    @abstractmethod
    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """The exact `state.nbytes` after reading `length` tokens in one or many pieces."""

    @abstractmethod
    def flops(self, length: int) -> int:
        """Multiply-adds x 2 of one forward over `length` tokens of one sequence, matrix products counted."""


class _Answered(Exception):
    """The heads' answers [B, T, H, V] are known; nothing after them is asked for."""

    def __init__(self, heads: Tensor) -> None:
        super().__init__()
        self.heads = heads


@dataclass(frozen=True)
class Signature:
    """What every state of one mixer has in common.

    kind: its class. names: of a RecurrentState's tensors. shapes: of each tensor but for the batch; None where a size
    depends on the tokens read.
    """

    kind: type[State]
    names: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]

    @classmethod
    def of(cls, state: State) -> Signature:
        """That of one state."""
        names = tuple(state.memory) if isinstance(state, RecurrentState) else ()
        return cls(type(state), names, tuple(tuple(tensor.shape[1:]) for tensor in state.tensors()))

    def check(self, state: State, name: str) -> None:
        """Raises InputError when `state` cannot be one of the mixer called `name`."""
        found = Signature.of(state)
        if not isinstance(state, self.kind) or set(found.names) != set(self.names):
            raise InputError(f"{name}: the state of another mixer: expected {self._words()}, got {found._words()}")
        if found.kind is not self.kind:
            return  # a subclass (a cache policy's, say) may keep fewer tokens, or store them in another form
        fits = len(found.shapes) == len(self.shapes) and all(
            len(has) == len(due) and all(b in (a, None) for a, b in zip(has, due, strict=True))
            for has, due in zip(found.shapes, self.shapes, strict=True)
        )
        if not fits:
            raise InputError(
                f"{name}: the state of a mixer with other options: expected tensors of shape "
                f"{_shapes(self.shapes)} after the batch, got {_shapes(found.shapes)}"
            )

    def _words(self) -> str:
        return self.kind.__name__ + (f" of {', '.join(self.names)}" if self.names else "")


def _shapes(shapes: tuple[tuple[int | None, ...], ...]) -> str:
    return ", ".join("[" + ", ".join("n" if size is None else str(size) for size in shape) + "]" for shape in shapes)


@torch.no_grad()
def _signature(mixer: Mixer, like: Tensor) -> Signature:
    """Found by two reads, of 1 token and of enough to make the state larger: sizes that differ grow with the length."""
    first = mixer.state_nbytes(1)
    many = next((n for n in (70, 128, 256, 512, 1024, 2048, 4096) if mixer.state_nbytes(n) != first), 70)
    training = mixer.training
    mixer.eval()
    left = []
    for length in (1, many):
        tokens = torch.zeros(1, length, dtype=torch.int64, device=like.device) if mixer.reads_tokens else None
        left.append(mixer(like.new_zeros(1, length, mixer.width), tokens=tokens)[1])
    mixer.train(training)
    few, more = (Signature.of(state) for state in left if state is not None)
    shapes = tuple(
        tuple(a if a == b else None for a, b in zip(one, other, strict=True))
        for one, other in zip(few.shapes, more.shapes, strict=True)
    )
    return Signature(few.kind, few.names, shapes)


def state_growth(mixer: Mixer) -> str:
    """How the bytes of the state grow with the tokens read: "none", "constant", "logarithmic" or "linear".

    Found from `state_nbytes` at 2^10, 2^14 and 2^18 tokens, not declared.
    """
    if not mixer.causal:
        return "none"
    few, some, many = (mixer.state_nbytes(2**n) for n in (10, 14, 18))
    if few == many:
        return "constant"
    return "linear" if many > 4 * some else "logarithmic"


def sequence_cost(mixer: Mixer) -> str:
    """How the operations of one forward grow with its T tokens: "T", "T log T" or "T^2".

    Found from `flops` at 2^16 and 2^20 tokens, not declared.
    """
    growth = mixer.flops(2**20) / (16 * mixer.flops(2**16))
    return "T" if growth < 1.02 else "T log T" if growth < 2 else "T^2"


def token_cost(mixer: Mixer) -> str:
    """How the time of one more token grows with the T tokens read: "1", "log T" or "T", as the state that it reads."""
    return {"none": "none", "constant": "1", "logarithmic": "log T", "linear": "T"}[state_growth(mixer)]


def head_size(width: int, heads: int, what: str = "heads") -> int:
    """width // heads. Raises InputError that names the nearest number of heads that divides the width."""
    if heads < 1:
        raise InputError(f"{what} must be at least 1, got {heads}")
    if width % heads:
        fits = nearest_divisor(width, heads)
        raise InputError(f"width {width} is not divisible by {heads} {what}; the nearest that divides it is {fits}")
    return width // heads
