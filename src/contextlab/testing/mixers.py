"""The laws of mixers. Each is put to fresh ones of width 24 in every option case, with noise on all parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from contextlab import registry
from contextlab.mixers.base import Mixer, sequence_cost, token_cost
from contextlab.state import RecurrentState
from contextlab.testing.law import Component, close, law, refused, require
from contextlab.testing.readings import WIDTH, Reading, WithTokens, noisy, read, readings


def cases(entry: registry.Entry) -> Iterator[Component]:
    """A registered mixer in each of its option cases, as the laws read it: noisy, with token ids made of x."""
    for options in entry.cases:

        def make(options: Mapping[str, Any] = options) -> Mixer:
            mixer = entry.build(width=WIDTH, **options)
            return noisy(WithTokens(mixer) if mixer.reads_tokens else mixer)

        yield Component("mixer", entry.name, entry.factory, options, make)


def causal(component: Component) -> bool:
    """Whether it reads forward only."""
    return bool(component.factory.causal)  # type: ignore[attr-defined]


def both_ways(component: Component) -> bool:
    """Whether it is an encoder."""
    return not causal(component)


def hold_to_split(mixer: Mixer, reading: Reading, tolerance: float) -> None:
    """The split law of one mixer and reading; `tolerance` in parts of the largest output."""
    whole, last = mixer(reading.x, None, reading.mask)
    dropped, none = mixer(reading.x, None, reading.mask, keep_state=False)
    require(none is None, "keep_state=False returned a state")
    require(last is not None, "keep_state=True returned no state")
    close(dropped[reading.real], whole[reading.real], tolerance, "outputs with keep_state=False")
    for no_grad in (False, True):  # a state may be written in place without gradients
        with torch.set_grad_enabled(not no_grad):
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


@law("mixer", "split", "Read in pieces, it answers as read whole (float64, 1e-9).", holds_for=causal, reading=readings())
def split(component: Component, reading: Reading) -> None:
    """The state is handed from piece to piece."""
    hold_to_split(component.build().double(), reading, 1e-9)


@law(
    "mixer",
    "split, float32",
    "Read in pieces, it answers as read whole (float32, 1e-4 of the largest).",
    holds_for=causal,
    reading=readings(dtype=torch.float32),
)
def split_float32(component: Component, reading: Reading) -> None:
    """A mixer that says it `amplifies_rounding` is allowed thirty times what the last digits of x move it."""
    mixer, tolerance = component.build(), 1e-4
    if mixer.amplifies_rounding:
        tolerance = min(1e-2, max(tolerance, 30 * rounding(mixer, reading)))
    hold_to_split(mixer, reading, tolerance)


@law("mixer", "causality", "Outputs do not change when later inputs do.", holds_for=causal, reading=readings())
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
        require(state.nbytes == expected, f"state.nbytes is {state.nbytes} after {tokens}, foretold {expected}")

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            hold(mixer(reading.x, None, reading.mask)[1], length)
            state, read_so_far = None, 0
            for piece, mask in reading.pieces:
                _, state = mixer(piece, state, mask)
                read_so_far += piece.shape[1]
                hold(state, read_so_far)
                require(state.length == read_so_far, f"state.length is {state.length} after {read_so_far}")


@law("mixer", "size", "state.nbytes is what state_nbytes foretells, exactly.", holds_for=causal, reading=readings())
def size(component: Component, reading: Reading) -> None:
    """After each piece, with and without gradients, in float64."""
    hold_to_size(component.build().double(), reading)


@law("mixer", "size, float32", "state.nbytes is what state_nbytes foretells in float32, too.", holds_for=causal)
def size_float32(component: Component) -> None:
    """After each of five pieces."""
    hold_to_size(component.build(), Reading(torch.randn(2, 70, WIDTH), [1, 2, 33, 64], None))


@law("mixer", "batch", "A row answers as it does alone, whatever its batch and left padding.", reading=readings())
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
    reading=readings(longest=40),
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
    reading=readings(longest=40),
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
        expected, _ = mixer(reading.x, state)
        for copy in (again, state.detach(), state.to("cpu"), state.to(torch.float64)):
            require(copy.length == state.length, f"a copy's length is {copy.length}, expected {state.length}")
            require(copy.nbytes == state.nbytes, f"a copy's nbytes are {copy.nbytes}, expected {state.nbytes}")
            mixer(reading.x.neg(), copy)  # must not write into what `state` holds
            close(mixer(reading.x, copy)[0], expected, what="outputs after a copy")
            close(mixer(reading.x, state)[0], expected, what="outputs after a copy was read on from")
        wide = [leaf for leaf in state.to(torch.float32).tensors() if leaf.dtype == torch.float64]
        require(not wide, "to(torch.float32) left float64 tensors")


@law(
    "mixer",
    "gradients in pieces",
    "Gradients through a state that is handed on are those of reading whole.",
    holds_for=causal,
    reading=readings(longest=80),
)
def gradients_in_pieces(component: Component, reading: Reading) -> None:
    """Of the inputs and of all parameters."""
    mixer = component.build().double()
    weight = torch.randn_like(reading.x) * reading.real[..., None]
    inputs = reading.x.clone().requires_grad_()
    wanted = [inputs, *mixer.parameters()]

    def gradients(y: Tensor) -> tuple[Tensor, ...]:  # zero for what so short a sequence does not use
        return torch.autograd.grad((y * weight).sum(), wanted, materialize_grads=True)

    whole = gradients(mixer(inputs, None, reading.mask)[0])
    pieces = gradients(read(mixer, Reading(inputs, reading.cuts, reading.mask))[0])
    for got, expected in zip(pieces, whole, strict=True):
        require(got.isfinite().all(), "gradients are not finite")
        close(got, expected, 1e-8, "gradients")


def hold_to_gradcheck(mixer: Mixer, padding: int) -> None:
    """Gradients of x against finite differences, float64."""
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) >= torch.tensor([padding, 0])[:, None] if padding else None

    def real_outputs(x: Tensor) -> Tensor:
        y = mixer(x, None, mask, False)[0]
        return y if mask is None else y[mask]

    require(torch.autograd.gradcheck(real_outputs, (x,), fast_mode=True), "gradcheck fails")


@law("mixer", "gradients", "Gradients are those of finite differences.")
def gradients(component: Component) -> None:
    """By torch.autograd.gradcheck."""
    hold_to_gradcheck(component.build().double(), 0)


@law("mixer", "gradients, padded", "Gradients are those of finite differences under left padding, too.")
def gradients_padded(component: Component) -> None:
    """Two tokens of the first row are padding."""
    hold_to_gradcheck(component.build().double(), 2)


@law("mixer", "parameters", "Every parameter has a gradient.")
def parameters(component: Component) -> None:
    """Over 80 tokens."""
    mixer = component.build().double()
    x = torch.randn(3, 80, WIDTH, dtype=torch.float64, requires_grad=True)  # for mixers without parameters
    mixer(x, keep_state=False)[0].square().sum().backward()
    unused = [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    require(not unused, f"without a gradient: {', '.join(unused)}")


@law("mixer", "flops", "flops grow with the length.")
def flops(component: Component) -> None:
    """From 16 to 32 tokens."""
    mixer = component.build()
    few, many = mixer.flops(16), mixer.flops(32)
    require(0 < few < many, f"flops(16) is {few}, flops(32) is {many}")


@law("mixer", "strange states", "States of another batch, mixer or option are refused.", holds_for=causal)
def strange_states(component: Component) -> None:
    """`Mixer.__call__` does so for all that `forward` hands on."""
    mixer, x = component.build(), torch.randn(2, 3, WIDTH)
    _, state = mixer(x)
    require(state is not None, "no state was handed on")
    refused(lambda: mixer(torch.randn(3, 1, WIDTH), state), "the state is of a batch of 2, x of 3")
    copied = state.select(torch.tensor([1, 0]))  # comes from nowhere, so it is checked, and fits
    mixer(x, copied)
    other = RecurrentState({"another's": torch.zeros(2, 5)}, length=3)
    refused(lambda: mixer(x, other), "the state of another mixer")
    if any(isinstance(p, Tensor) and p.ndim > 1 for p in pytree.tree_leaves(copied)):
        wide = copied.map(lambda tensor: torch.cat([tensor] * 2, -1) if tensor.ndim > 1 else tensor)
        refused(lambda: mixer(x, wide), "the state of a mixer with other options")


@law("mixer", "strange inputs", "Inputs and masks of another shape are refused.")
def strange_inputs(component: Component) -> None:
    """`Mixer.__call__` does so."""
    mixer = component.build()
    refused(lambda: mixer(torch.randn(2, 3, WIDTH + 1)), "expected x [B, T, 24], got [2, 3, 25]")
    mask = torch.ones(3, 3, dtype=torch.bool)
    refused(lambda: mixer(torch.randn(2, 3, WIDTH), None, mask), "expected mask bool [2, 3], got bool [3, 3]")


@law("mixer", "no state", "An encoder keeps no state; padding takes no gradient.", holds_for=both_ways, reading=readings())
def no_state(component: Component, reading: Reading) -> None:
    """Nor does it take one."""
    mixer, x = component.build().double(), reading.x.clone().requires_grad_()
    y, state = mixer(x, None, reading.mask)
    require(state is None, "a state was handed on")
    foretold = mixer.state_nbytes(x.shape[1], x.shape[0], x.dtype)
    require(foretold == 0, f"state_nbytes is {foretold}, expected 0")
    require(y.isfinite().all(), "outputs are not finite")
    gradient = torch.autograd.grad(y[reading.real].square().sum(), x)[0]
    require(gradient.isfinite().all(), "gradients are not finite")
    require(not gradient[~reading.real].any(), "padding has a gradient")


@law("mixer", "both ways", "An encoder reads both ways and refuses a state.", holds_for=both_ways)
def reads_both_ways(component: Component) -> None:
    """The first token sees the last, and the last the first."""
    mixer = component.build().double()
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    first, last = (torch.autograd.grad(mixer(x)[0][0, at].square().sum(), x)[0][0] for at in (0, 8))
    require(first[8].any(), "the first token does not see the last")
    require(last[0].any(), "the last token does not see the first")
    given = torch.randn(1, 2, WIDTH, dtype=torch.float64)
    refused(lambda: mixer(given, RecurrentState()), "reads both ways and takes no state")


def hold_to_half(component: Component, autocast: bool) -> None:
    """Outputs and gradients in bfloat16, against float32 with the same parameters."""
    torch.manual_seed(0)
    mixer, exact = component.build(), component.build()
    exact.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 70, WIDTH).bfloat16()
    given = (x.float() if autocast else x).requires_grad_()
    if not autocast:
        mixer, exact = mixer.bfloat16(), exact.bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = mixer(given)
        if state is not None:
            more = mixer(given[:, :3], state)[0]
            require(more.isfinite().all(), "outputs from the state are not finite")
    y.float().square().sum().backward()
    require(given.grad is not None and given.grad.isfinite().all(), "gradients are not finite")
    if mixer.hard_choices:
        return  # choices that rounding tips over change the answer at once
    expected, _ = exact(x.float())
    error = float((y.detach().float() - expected.detach()).norm() / expected.detach().norm())
    require(error < 0.1, f"outputs are {error:.3g} of their norm off, allowed 0.1")


@law("mixer", "bfloat16", "In bfloat16 outputs and gradients are finite, and within a tenth of float32's.")
def bfloat16(component: Component) -> None:
    """Parameters and inputs alike."""
    hold_to_half(component, autocast=False)


@law("mixer", "autocast", "Under autocast outputs and gradients are finite, and within a tenth of float32's.")
def autocast(component: Component) -> None:
    """Parameters and inputs in float32."""
    hold_to_half(component, autocast=True)


@law("mixer", "description", "It says how it works: parallel_form is set, its costs are of a known order.")
def description(component: Component) -> None:
    """What `contextlab list mixers` prints."""
    mixer = component.build()
    require(mixer.parallel_form != "?", "parallel_form is not set; for example 'attention', 'chunks', 'scan' or 'loop'")
    growth = sequence_cost(mixer)
    require(growth in ("T", "T log T", "T^2"), f"flops grow as {growth}")
    token = token_cost(mixer)
    require(token in ("none", "1", "log T", "T"), f"a token costs {token}")
