"""The laws of mixers: what is read in pieces, and states. They are put to fresh ones of width 24."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from contextlab import registry
from contextlab.mixers.base import Mixer
from contextlab.testing.law import Component, close, law, require
from contextlab.testing.readings import WIDTH, Reading, Readings, WithTokens, noisy, read


def cases(entry: registry.Entry) -> Iterator[Component]:
    """A registered mixer in each of its option cases, as the laws read it: noisy, with token ids made of x."""
    for options in entry.cases:

        def make(options: Mapping[str, Any] = options, noise: bool = True) -> Mixer:
            return fresh(entry, options, noise)

        yield Component("mixer", entry.name, entry.factory, options, make)


def fresh(entry: registry.Entry, options: Mapping[str, Any], noise: bool = True) -> Mixer:
    """A mixer of width 24 with these options, as the laws read it."""
    mixer: Mixer = entry.build(width=WIDTH, **options)
    mixer = WithTokens(mixer) if mixer.reads_tokens else mixer
    return noisy(mixer) if noise else mixer


def causal(component: Component) -> bool:
    """Whether it reads forward only."""
    return bool(component.factory.causal)  # type: ignore[attr-defined]


def both_ways(component: Component) -> bool:
    """Whether it is an encoder."""
    return not causal(component)


BOTH = (True, False)
"""Of gradients: with them, and without, when a state may be written in place."""


def one_of_both(reading: Reading) -> tuple[bool, ...]:
    """With gradients or without, in turn over the cases of a law; for laws whose cases are many."""
    return BOTH if reading.seed is None else (reading.seed % 2 == 0,)


def hold_to_split(mixer: Mixer, reading: Reading, tolerance: float, grads: tuple[bool, ...] = BOTH) -> None:
    """The split law of one mixer and reading; `tolerance` in parts of the largest output.

    grads: whether pieces are read with gradients, each in turn.
    """
    whole, last = mixer(reading.x, None, reading.mask)
    dropped, none = mixer(reading.x, None, reading.mask, keep_state=False)
    require(none is None, "keep_state=False returned a state")
    if last is None:
        raise AssertionError("keep_state=True returned no state")
    close(dropped[reading.real], whole[reading.real], tolerance, "outputs with keep_state=False")
    for grad in grads:
        with torch.set_grad_enabled(grad):
            pieces, state = read(mixer, reading)
        require(pieces.isfinite().all(), "outputs are not finite")
        close(pieces[reading.real], whole[reading.real], tolerance, "outputs in pieces")
        for each in (state, last):
            require(each.length == reading.x.shape[1], f"state.length is {each.length} after {reading.x.shape[1]}")
    # Both states hold the same memory: what is read next is answered alike.
    more = torch.flip(reading.x, (1,))[:, :3]
    close(mixer(more, state)[0], mixer(more, last)[0], tolerance, "outputs after the pieces")


@torch.no_grad()
def rounding(mixer: Mixer, reading: Reading) -> float:
    """How far answers move, in parts of the largest, when the input's last digits change."""
    more = torch.flip(reading.x, (1,))[:, :3]
    x = torch.cat((reading.x, more), 1)
    mask = None if reading.mask is None else torch.cat((reading.mask, reading.mask.new_ones(more.shape[:2])), 1)
    exact, _ = mixer(x, None, mask)
    far = 0.0
    for digit in (1, -1):
        moved, _ = mixer(x * (1 + digit * torch.finfo(x.dtype).eps), None, mask)
        far = max(far, float((moved - exact).abs().max()))
    return far / max(1.0, float(exact.abs().max()))


def allowed(mixer: Mixer, reading: Reading, tolerance: float, most: float) -> float:
    """`tolerance`; a mixer that `amplifies_rounding` may err by thirty times what last digits move it, up to `most`."""
    return min(most, max(tolerance, 30 * rounding(mixer, reading))) if mixer.amplifies_rounding else tolerance


@law(
    "mixer",
    "split",
    "Read in pieces, it answers as read whole (float64, 1e-9).",
    holds_for=causal,
    share=0.4,
    reading=Readings(),
)
def split(component: Component, reading: Reading) -> None:
    """The state is handed from piece to piece."""
    mixer = component.build().double()
    hold_to_split(mixer, reading, allowed(mixer, reading, 1e-9, 1e-5), one_of_both(reading))


@law(
    "mixer",
    "split, float32",
    "Read in pieces, it answers as read whole (float32, 1e-4 of the largest).",
    holds_for=causal,
    share=0.25,
    reading=Readings(dtype=torch.float32),
)
def split_float32(component: Component, reading: Reading) -> None:
    """The state is handed from piece to piece."""
    mixer = component.build()
    hold_to_split(mixer, reading, allowed(mixer, reading, 1e-4, 1e-2), one_of_both(reading))


@law(
    "mixer",
    "causality",
    "Outputs do not change when later inputs do.",
    holds_for=causal,
    share=0.25,
    reading=Readings(),
)
def causality(component: Component, reading: Reading) -> None:
    """Inputs after a position are replaced by others of three times their size."""
    mixer, after = component.build().double(), reading.at + 1
    changed = reading.x.clone()
    changed[:, after:] = changed[:, after:].flip(0, 1) * 3 + 1
    before, _ = mixer(reading.x, None, reading.mask)
    answered, _ = mixer(changed, None, reading.mask)
    real = reading.real.clone()
    real[:, after:] = False
    close(answered[real], before[real], what=f"outputs up to {reading.at}")


def hold_to_size(mixer: Mixer, reading: Reading) -> None:
    """The size law of one mixer and reading."""
    batch, length = reading.x.shape[:2]

    def hold(state: Any, tokens: int) -> None:
        expected = mixer.state_nbytes(tokens, batch, reading.x.dtype)
        require(
            state.nbytes == expected,
            f"state.nbytes is {state.nbytes} after {tokens} tokens, state_nbytes says {expected}",
        )

    alone = mixer.state_nbytes(length), mixer.state_nbytes(length, 1, torch.float32)
    require(alone[0] == alone[1], f"state_nbytes({length}) is {alone[0]}, of one row in float32 it is {alone[1]}")
    for grad in one_of_both(reading):
        with torch.set_grad_enabled(grad):
            hold(mixer(reading.x, None, reading.mask)[1], length)
            read_so_far = 0
            state: Any = None
            for piece, mask in reading.pieces:
                _, state = mixer(piece, state, mask)
                read_so_far += piece.shape[1]
                hold(state, read_so_far)
                require(state.length == read_so_far, f"state.length is {state.length} after {read_so_far} tokens")


@law(
    "mixer",
    "size",
    "state.nbytes is exactly what state_nbytes predicts.",
    holds_for=causal,
    share=0.25,
    reading=Readings(),
)
def size(component: Component, reading: Reading) -> None:
    """After each piece, with or without gradients, in float64."""
    hold_to_size(component.build().double(), reading)


@law("mixer", "size, float32", "state.nbytes is what state_nbytes predicts in float32, too.", holds_for=causal)
def size_float32(component: Component) -> None:
    """After each of five pieces, without gradients."""
    hold_to_size(component.build(), Reading(torch.randn(2, 70, WIDTH), [1, 2, 33, 64], None, seed=1))


@law(
    "mixer",
    "batch",
    "A row answers as it does alone, whatever its batch and left padding.",
    share=0.25,
    reading=Readings(),
)
def batch(component: Component, reading: Reading) -> None:
    """Each row is read again by itself, without its padding."""
    mixer = component.build().double()
    together, _ = mixer(reading.x, None, reading.mask)
    for row in range(reading.x.shape[0]):
        if not reading.real[row].any():
            continue
        alone, _ = mixer(reading.x[row : row + 1, reading.real[row]], None)
        close(together[row, reading.real[row]], alone[0], what=f"outputs of row {row}")


@law(
    "mixer",
    "branches",
    "A state stays valid when others read on from it; its rows can be picked.",
    holds_for=causal,
    share=0.25,
    reading=Readings(longest=40),
)
def branches(component: Component, reading: Reading) -> None:
    """Without gradients, when buffers may be shared."""
    mixer = component.build().double()
    cut = max(1, reading.x.shape[1] // 2)
    head, tail = reading.x[:, :cut], reading.x[:, cut:]
    mask_head, mask_tail = (None, None) if reading.mask is None else (reading.mask[:, :cut], reading.mask[:, cut:])
    with torch.no_grad():
        _, state = mixer(head, None, mask_head)
        first, after = mixer(tail, state, mask_tail)
        mixer(-tail.flip(0), state, mask_tail)  # another branch of the same state
        second, _ = mixer(tail, state, mask_tail)
        close(second, first, what="outputs after another branch")
        # ... nor does a branch disturb what the first one's state holds.
        more = reading.x[:, :2]
        expected = mixer(more, mixer(tail, state.map(torch.clone), mask_tail)[1])[0]
        close(mixer(more, after)[0], expected, what="outputs of a branch gone on with")
        # Rows picked and repeated go on as the rows would.
        rows = torch.tensor([reading.x.shape[0] - 1, 0, 0])
        picked = state.select(rows)
        both_mask = None if mask_tail is None else mask_tail[rows]
        close(mixer(tail[rows], picked, both_mask)[0], first[rows], what="outputs of picked rows")
        close(mixer(tail, state, mask_tail)[0], first, what="outputs after rows were picked")


@law(
    "mixer",
    "trees",
    "A state is a pytree of tensors [B, ...] that can be copied and moved.",
    holds_for=causal,
    share=0.25,
    reading=Readings(longest=40),
)
def trees(component: Component, reading: Reading) -> None:
    """Copies by unflattening, `detach` and `to` share nothing that is written."""
    mixer = component.build().double()
    with torch.no_grad():
        _, state = mixer(reading.x, None, reading.mask)
        leaves, tree = pytree.tree_flatten(state)
        require(leaves, "the state has no tensors that the pytree sees")
        for leaf in leaves:
            require(isinstance(leaf, Tensor), f"a leaf of the state is no tensor but {type(leaf).__name__}")
            require(len(leaf) == len(reading.x), f"a leaf has shape {list(leaf.shape)}, expected the batch first")
        again = pytree.tree_unflatten(leaves, tree)
        require(type(again) is type(state), f"unflattened, a {type(state).__name__} is a {type(again).__name__}")
        more = reading.x[:, :12]
        expected, _ = mixer(more, state)
        moved = state.to("cpu") if reading.seed is None or reading.seed % 2 else state.to(torch.float64)
        for copy in (again, state.detach(), moved):
            require(copy.length == state.length, f"a copy's length is {copy.length}, expected {state.length}")
            require(copy.nbytes == state.nbytes, f"a copy's nbytes are {copy.nbytes}, expected {state.nbytes}")
            mixer(more.neg(), copy)  # must not write into what `state` holds
            close(mixer(more, copy)[0], expected, what="outputs after a copy")
        close(mixer(more, state)[0], expected, what="outputs after copies were read on from")
        wide = [leaf for leaf in state.to(torch.float32).tensors() if leaf.dtype == torch.float64]
        require(not wide, "to(torch.float32) left float64 tensors")
