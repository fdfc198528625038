"""The laws that every registered mixer is held to, under each of the option cases it was registered with.

A new mixer gets all of this with no new test code. `BROKEN` at the end shows that each law can fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import contextlab.mixers  # noqa: F401  (registers every mixer)
from contextlab import registry
from contextlab.errors import InputError
from contextlab.mixers.base import Mixer, family_of, sequence_cost, token_cost
from contextlab.mixers.segment.recurrent_memory import RecurrentMemory
from contextlab.state import RecurrentState, State, own

WIDTH = 24  # many numbers of heads divide it
Build = Callable[[], Mixer]


def noisy(mixer: Mixer) -> Mixer:
    """The mixer with noise on every parameter, so that parts that start at zero or one count too."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


class WithTokens(Mixer):
    """A mixer that reads token ids, as one that makes them of x: four symbols, by the signs of two channels."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__(mixer.width)
        self.inner = mixer
        self.__dict__["parallel_form"] = mixer.parallel_form

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        return self.inner(x, state, mask, keep_state, (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0))

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        return self.inner.state_nbytes(length, batch, dtype)

    def flops(self, length: int) -> int:
        return self.inner.flops(length)


def cases(causal: bool | None = True) -> list[Any]:
    """One test parameter a registered mixer and option case."""
    found = []
    for entry in registry.entries("mixer"):
        if causal is not None and entry.factory.causal != causal:
            continue
        for options in entry.cases:
            label = "-".join(f"{key}={value}" for key, value in options.items())

            def build(entry: registry.Entry = entry, options: Any = options) -> Mixer:
                mixer = entry.build(width=WIDTH, **options)
                return noisy(WithTokens(mixer) if mixer.reads_tokens else mixer)

            found.append(pytest.param(build, id=f"{entry.name}-{label}" if label else entry.name))
    return found


every_causal = pytest.mark.parametrize("build", cases())
every_encoder = pytest.mark.parametrize("build", cases(causal=False))
every = pytest.mark.parametrize("build", cases(causal=None))


@dataclass
class Reading:
    """One example: a batch of sequences, how they are cut, how much of each is left padding."""

    x: Tensor
    cuts: list[int]
    mask: Tensor | None

    @property
    def pieces(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for start, stop in pairwise([0, *self.cuts, self.x.shape[1]]):
            yield self.x[:, start:stop], None if self.mask is None else self.mask[:, start:stop]

    @property
    def real(self) -> Tensor:
        """[B, T] bool: where the outputs count."""
        return torch.ones(self.x.shape[:2], dtype=torch.bool) if self.mask is None else self.mask


@st.composite
def readings(
    draw: st.DrawFn, longest: int = 150, dtype: torch.dtype = torch.float64, padded: bool | None = None
) -> Reading:
    batch = draw(st.integers(1, 3))
    length = draw(st.integers(2, longest))
    near = [n + d for n in (16, 32, 64, 128) for d in (-1, 0, 1) if n + d < length]  # where chunks end
    cut = st.integers(1, length - 1) | st.sampled_from(near) if near else st.integers(1, length - 1)
    cuts = draw(st.lists(cut, max_size=6, unique=True))
    if draw(st.booleans()):  # a run of one-token pieces
        first = draw(st.integers(1, length - 1))
        cuts = list({*cuts, *range(first, min(first + 4, length))})
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(batch, length, WIDTH, dtype=dtype, generator=generator)
    mask = None
    if draw(st.booleans()) if padded is None else padded:
        pads = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
        mask = torch.arange(length) >= torch.tensor(pads)[:, None]
    return Reading(x, sorted(cuts), mask)


def read(mixer: Mixer, reading: Reading) -> tuple[Tensor, State]:
    """Read in pieces, the state handed on."""
    outputs, state = [], None
    for piece, mask in reading.pieces:
        y, state = mixer(piece, state, mask)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 1), state


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(got, expected, atol=tolerance * scale, rtol=0)


# The laws, as functions of a mixer, so that the broken ones below can be put to them too.


def split_law(mixer: Mixer, reading: Reading, tolerance: float = 1e-9) -> None:
    whole, last = mixer(reading.x, None, reading.mask)
    dropped, none = mixer(reading.x, None, reading.mask, keep_state=False)
    assert none is None
    close(dropped[reading.real], whole[reading.real], tolerance)
    for no_grad in (False, True):  # a state may be written in place without gradients
        with torch.set_grad_enabled(not no_grad):
            pieces, state = read(mixer, reading)
        assert pieces.isfinite().all()
        close(pieces[reading.real], whole[reading.real], tolerance)
        assert state.length == last.length == reading.x.shape[1]
    # Both states hold the same memory: what is read next is answered alike.
    more = torch.flip(reading.x, (1,))[:, :3]
    close(mixer(more, state)[0], mixer(more, last)[0], tolerance)


@torch.no_grad()
def rounding(mixer: Mixer, reading: Reading) -> float:
    """How far answers move, in parts of the largest, when the input's last digits change.

    A memory that is written by what it was read for can make much of them (recurrent_memory, over a hundred tokens).
    """
    more = torch.flip(reading.x, (1,))[:, :3]
    x = torch.cat((reading.x, more), 1)
    mask = None if reading.mask is None else torch.cat((reading.mask, reading.mask.new_ones(more.shape[:2])), 1)
    exact, _ = mixer(x, None, mask)
    far = 0.0
    for digit in (1, -1):
        moved, _ = mixer(x * (1 + digit * torch.finfo(x.dtype).eps), None, mask)
        far = max(far, float((moved - exact).abs().max()))
    return far / max(1.0, float(exact.abs().max()))


def causality_law(mixer: Mixer, reading: Reading, at: int) -> None:
    changed = reading.x.clone()
    changed[:, at + 1 :] = changed[:, at + 1 :].flip(0, 1) * 3 + 1
    before, _ = mixer(reading.x, None, reading.mask)
    after, _ = mixer(changed, None, reading.mask)
    real = reading.real.clone()
    real[:, at + 1 :] = False
    close(after[real], before[real])


def size_law(mixer: Mixer, reading: Reading) -> None:
    batch, length = reading.x.shape[:2]
    expected = mixer.state_nbytes(length, batch, reading.x.dtype)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert mixer(reading.x, None, reading.mask)[1].nbytes == expected
            state, read_so_far = None, 0
            for piece, mask in reading.pieces:
                _, state = mixer(piece, state, mask)
                read_so_far += piece.shape[1]
                assert state.nbytes == mixer.state_nbytes(read_so_far, batch, reading.x.dtype)
                assert state.length == read_so_far


def batch_law(mixer: Mixer, reading: Reading) -> None:
    together, _ = mixer(reading.x, None, reading.mask)
    for row in range(reading.x.shape[0]):
        if not reading.real[row].any():
            continue
        alone, _ = mixer(reading.x[row : row + 1, reading.real[row]], None)
        close(together[row, reading.real[row]], alone[0])


def encoder_law(mixer: Mixer, reading: Reading) -> None:
    x = reading.x.clone().requires_grad_()
    y, state = mixer(x, None, reading.mask)
    assert state is None
    assert mixer.state_nbytes(reading.x.shape[1], reading.x.shape[0], reading.x.dtype) == 0
    assert y.isfinite().all()
    gradient = torch.autograd.grad(y[reading.real].square().sum(), x)[0]
    assert gradient.isfinite().all()
    assert not gradient[~reading.real].any()


def both_ways_law(mixer: Mixer) -> None:
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    first, last = (torch.autograd.grad(mixer(x)[0][0, at].square().sum(), x)[0][0] for at in (0, 8))
    assert first[8].any()
    assert last[0].any()


def handed_gradient_law(mixer: Mixer, reading: Reading) -> None:
    weight = torch.randn_like(reading.x) * reading.real[..., None]
    inputs = reading.x.clone().requires_grad_()
    wanted = [inputs, *mixer.parameters()]

    def gradients(y: Tensor) -> tuple[Tensor, ...]:  # zero for what so short a sequence does not use
        return torch.autograd.grad((y * weight).sum(), wanted, materialize_grads=True)

    whole = gradients(mixer(inputs, None, reading.mask)[0])
    pieces = gradients(read(mixer, Reading(inputs, reading.cuts, reading.mask))[0])
    for got, expected in zip(pieces, whole, strict=True):
        assert got.isfinite().all()
        close(got, expected, 1e-8)


def branch_law(mixer: Mixer, reading: Reading) -> None:
    cut = max(1, reading.x.shape[1] // 2)
    head, tail = reading.x[:, :cut], reading.x[:, cut:]
    mask_head, mask_tail = (None, None) if reading.mask is None else (reading.mask[:, :cut], reading.mask[:, cut:])
    with torch.no_grad():
        _, state = mixer(head, None, mask_head)
        first, after = mixer(tail, state, mask_tail)
        mixer(-tail.flip(0), state, mask_tail)  # another branch of the same state
        second, _ = mixer(tail, state, mask_tail)
        close(second, first)
        # ... nor does a branch disturb what the first one's state holds.
        more = reading.x[:, :2]
        expected = mixer(more, mixer(tail, state.map(torch.clone), mask_tail)[1])[0]
        close(mixer(more, after)[0], expected)
        # Rows picked and repeated go on as the rows would.
        rows = torch.tensor([reading.x.shape[0] - 1, 0, 0])
        picked = state.select(rows)
        both_mask = None if mask_tail is None else mask_tail[rows]
        close(mixer(tail[rows], picked, both_mask)[0], first[rows])
        close(mixer(tail, state, mask_tail)[0], first)


def tree_law(mixer: Mixer, reading: Reading) -> None:
    with torch.no_grad():
        _, state = mixer(reading.x, None, reading.mask)
        leaves, tree = pytree.tree_flatten(state)
        assert leaves
        assert all(isinstance(leaf, Tensor) and leaf.shape[0] == reading.x.shape[0] for leaf in leaves)
        again = pytree.tree_unflatten(leaves, tree)
        assert type(again) is type(state)
        expected, _ = mixer(reading.x, state)
        for copy in (again, state.detach(), state.to("cpu"), state.to(torch.float64)):
            assert copy.length == state.length
            assert copy.nbytes == state.nbytes
            mixer(reading.x.neg(), copy)  # must not write into what `state` holds
            close(mixer(reading.x, copy)[0], expected)
            close(mixer(reading.x, state)[0], expected)
        assert all(leaf.dtype != torch.float64 for leaf in state.to(torch.float32).tensors())


@every_causal
@given(data=st.data())
def test_split_law(build: Build, data: st.DataObject) -> None:
    split_law(build().double(), data.draw(readings()))


@every_causal
@given(data=st.data())
def test_split_law_in_float32(build: Build, data: st.DataObject) -> None:
    mixer, reading = build(), data.draw(readings(dtype=torch.float32))
    tolerance = 1e-4
    if isinstance(mixer, RecurrentMemory):  # alone in making so much of last digits
        tolerance = min(1e-2, max(tolerance, 30 * rounding(mixer, reading)))
    split_law(mixer, reading, tolerance)


@every_causal
@given(data=st.data())
def test_causality(build: Build, data: st.DataObject) -> None:
    reading = data.draw(readings())
    causality_law(build().double(), reading, data.draw(st.integers(0, reading.x.shape[1] - 2)))


@every_causal
@given(reading=readings())
def test_honest_size(build: Build, reading: Reading) -> None:
    size_law(build().double(), reading)


@every_causal
def test_honest_size_in_float32(build: Build) -> None:
    size_law(build(), Reading(torch.randn(2, 70, WIDTH), [1, 2, 33, 64], None))


@every
@given(reading=readings())
def test_batch_independence(build: Build, reading: Reading) -> None:
    batch_law(build().double(), reading)


@every_causal
@given(reading=readings(longest=40))
def test_branches(build: Build, reading: Reading) -> None:
    branch_law(build().double(), reading)


@every_causal
@given(reading=readings(longest=40))
def test_states_are_trees(build: Build, reading: Reading) -> None:
    tree_law(build().double(), reading)


@every_causal
@given(reading=readings(longest=80))
def test_gradients_through_a_handed_on_state(build: Build, reading: Reading) -> None:
    handed_gradient_law(build().double(), reading)


@every
@pytest.mark.parametrize("padding", [0, 2])
def test_gradcheck(build: Build, padding: int) -> None:
    mixer = build().double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) >= torch.tensor([padding, 0])[:, None] if padding else None

    def real_outputs(x: Tensor) -> Tensor:
        y = mixer(x, None, mask, False)[0]
        return y if mask is None else y[mask]

    assert torch.autograd.gradcheck(real_outputs, (x,), fast_mode=True)


@every
def test_every_parameter_matters(build: Build) -> None:
    mixer = build().double()
    x = torch.randn(3, 80, WIDTH, dtype=torch.float64, requires_grad=True)  # for mixers without parameters
    mixer(x, keep_state=False)[0].square().sum().backward()
    unused = [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not unused


@every
def test_flops_grow(build: Build) -> None:
    mixer = build()
    assert 0 < mixer.flops(16) < mixer.flops(32)


@every_causal
def test_states_of_another_batch_or_mixer_are_refused(build: Build) -> None:
    mixer, x = build(), torch.randn(2, 3, WIDTH)
    _, state = mixer(x)
    assert state is not None
    with pytest.raises(InputError, match="the state is of a batch of 2, x of 3"):
        mixer(torch.randn(3, 1, WIDTH), state)
    copied = state.select(torch.tensor([1, 0]))  # comes from nowhere, so it is checked, and fits
    mixer(x, copied)
    other = RecurrentState({"another's": torch.zeros(2, 5)}, length=3)
    with pytest.raises(InputError, match="the state of another mixer"):
        mixer(x, other)
    wider = [p for p in pytree.tree_leaves(copied) if isinstance(p, Tensor)]
    if any(p.ndim > 1 for p in wider):
        with pytest.raises(InputError, match="the state of a mixer with other options"):
            mixer(x, copied.map(lambda tensor: torch.cat([tensor] * 2, -1) if tensor.ndim > 1 else tensor))


@every_encoder
@given(reading=readings())
def test_encoders_leave_no_state_and_ignore_padding(build: Build, reading: Reading) -> None:
    encoder_law(build().double(), reading)


@every_encoder
def test_encoders_read_both_ways_and_take_no_state(build: Build) -> None:
    mixer = build().double()
    both_ways_law(mixer)
    with pytest.raises(InputError, match="reads both ways and takes no state"):
        mixer(torch.randn(1, 2, WIDTH, dtype=torch.float64), RecurrentState())


@every
def test_inputs_of_another_width_are_refused(build: Build) -> None:
    mixer = build()
    with pytest.raises(InputError, match=r"expected x \[B, T, 24\], got \[2, 3, 25\]"):
        mixer(torch.randn(2, 3, WIDTH + 1))
    with pytest.raises(InputError, match=r"expected mask bool \[2, 3\], got bool \[3, 3\]"):
        mixer(torch.randn(2, 3, WIDTH), None, torch.ones(3, 3, dtype=torch.bool))


@every
def test_a_mixer_says_how_it_works_and_where_it_belongs(build: Build) -> None:
    mixer = build()
    assert mixer.parallel_form != "?"
    assert family_of(type(mixer.inner if isinstance(mixer, WithTokens) else mixer)) != "other"
    assert sequence_cost(mixer) in ("T", "T log T", "T^2")
    assert token_cost(mixer) in ("none", "1", "log T", "T")


# What the harness is for: mixers that break one law each, and must be caught.


class Sum(Mixer):
    """y_t = W (x_1 + ... + x_t): keeps every law; its children break one each."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        if mask is not None:
            x = x * mask[..., None]
        total = x.cumsum(1)
        if state is not None:
            assert isinstance(state, RecurrentState)
            total = total + state["total"][:, None]
        read = x.shape[1] + (0 if state is None else state.length)
        after = RecurrentState({"total": own(total[:, -1])}, length=read) if keep_state else None
        return self.proj(total), after

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        return batch * self.width * dtype.itemsize

    def flops(self, length: int) -> int:
        return 2 * length * self.proj.weight.numel()


class Forgets(Sum):
    """Drops the state that it is given."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, None, mask, keep_state)
        if after is not None and state is not None:
            after.length += state.length
        return y, after


class Miscounts(Sum):
    """Counts only the last piece's tokens."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        if after is not None:
            after.length = x.shape[1]
        return y, after


class Peeks(Sum):
    """Sees the next token of the piece."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        return y + 1e-6 * torch.cat([x[:, 1:], x[:, -1:]], 1), after


class Hoards(Sum):
    """Holds the whole buffer by a small view of it."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        if after is not None:
            total = after["total"]
            after.memory["total"] = torch.stack([total, total], 0)[0]
        return y, after


class Mixes(Sum):
    """Lets a row see the batch's mean."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        return y + 1e-6 * x.mean(0), after


class ReadsPadding(Sum):
    """Takes padding for tokens."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        return super().forward(x, state, None, keep_state)


class Detaches(Sum):
    """Cuts the gradient where the state is handed on."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        return super().forward(x, None if state is None else state.detach(), mask, keep_state)


class Overwrites(Sum):
    """Writes into the state that it is given."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        if state is not None and after is not None and not torch.is_grad_enabled():
            state["total"].copy_(after["total"])
        return y, after


class PicksNothing(Sum):
    """Has a state of which no rows can be picked."""

    @dataclass
    class Stuck(RecurrentState):
        memory: dict[str, Tensor] = field(default_factory=dict)

        def select(self, rows: Tensor) -> Any:
            return self.map(lambda tensor: tensor[:1].expand(len(rows), -1).clone())

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        return y, after and self.Stuck(after.memory, length=after.length)


class HidesItsMemory(Sum):
    """Keeps its memory where the pytree does not see it."""

    @dataclass
    class Hidden(RecurrentState):
        memory: dict[str, Tensor] = field(default_factory=dict, metadata={"static": True})

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        return y, after and self.Hidden(after.memory, length=after.length)


def example(padded: bool = False) -> Reading:
    mask = torch.arange(9) >= torch.tensor([4, 0, 2])[:, None] if padded else None
    return Reading(torch.randn(3, 9, WIDTH, dtype=torch.float64), [2, 3, 7], mask)


LAWS: dict[str, Callable[[Mixer], None]] = {
    "split": lambda mixer: split_law(mixer, example()),
    "split, padded": lambda mixer: split_law(mixer, example(padded=True)),
    "causality": lambda mixer: causality_law(mixer, example(), 4),
    "size": lambda mixer: size_law(mixer, example()),
    "batch": lambda mixer: batch_law(mixer, example()),
    "padding": lambda mixer: batch_law(mixer, example(padded=True)),
    "gradient": lambda mixer: handed_gradient_law(mixer, example()),
    "branch": lambda mixer: branch_law(mixer, example()),
    "tree": lambda mixer: tree_law(mixer, example()),
}
BROKEN: list[tuple[type[Mixer], str]] = [
    (Forgets, "split"),
    (Forgets, "split, padded"),
    (Miscounts, "split"),
    (Peeks, "causality"),
    (Hoards, "size"),
    (Miscounts, "size"),
    (Mixes, "batch"),
    (ReadsPadding, "padding"),
    (Detaches, "gradient"),
    (Overwrites, "branch"),
    (PicksNothing, "branch"),
    (HidesItsMemory, "tree"),
]


@pytest.mark.parametrize("law", LAWS)
def test_harness_passes_a_lawful_mixer(law: str) -> None:
    LAWS[law](Sum().double())


@pytest.mark.parametrize(("broken", "law"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_harness_catches_a_broken_mixer(broken: Callable[[], Mixer], law: str) -> None:
    mixer = broken().double()
    with pytest.raises((AssertionError, TypeError)):
        LAWS[law](mixer)


@pytest.mark.parametrize(
    "law", [lambda mixer: encoder_law(mixer, example()), both_ways_law], ids=["state", "both ways"]
)
def test_harness_catches_a_causal_mixer_among_encoders(law: Callable[[Mixer], None]) -> None:
    with pytest.raises(AssertionError):
        law(Sum().double())
