"""The laws of policies. Each is put to a policy on a small model, in every option case that it is registered with.

The functions `hold_to_...` take any callable that builds a policy, so that policies composed of others are held, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from contextlab import registry
from contextlab.models import build_model
from contextlab.policies import Policy
from contextlab.testing.law import Component, close, law, refused, require
from contextlab.testing.options import a_case, hold_to_options
from contextlab.testing.policy_readings import SIZE as SIZE
from contextlab.testing.policy_readings import masked, model, read, read_on, tokens

Build = Callable[..., Policy]


def cases(entry: registry.Entry) -> Iterator[Component]:
    """A registered policy in each of its option cases; `build` takes a budget and further options that it knows."""
    known = {parameter.name for parameter in entry.parameters}
    small = {"window": 4} if "window" in known else {}
    for options in entry.cases:

        def make(options: Mapping[str, Any] = options, **more: Any) -> Policy:
            policy: Policy = entry.build(**{**small, **options, **{k: v for k, v in more.items() if k in known}})
            return policy

        yield Component("policy", entry.name, entry.factory, options, make)


PADS = (0, 7)


def hold_to_full_budget(build: Build, pads: tuple[int, ...] | None) -> None:
    """With all the room that there is, the model answers as without a policy."""
    reader, x = model(), tokens(length=52)
    mask = masked(x, pads)
    expected, _, _ = read(reader, x, [52], mask)
    with build(budget="100%").attach(reader):
        got, state, _ = read(reader, x, [30, 12], mask)
    real = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask
    require(state.length == 52, f"state.length is {state.length} after 52")
    if not build().lossless:  # what is lost is only seen when it is read back: by the pieces after the first
        same = torch.allclose(got[real], expected[real], rtol=0, atol=1e-9)
        require(not same, "it says that it loses something, and loses nothing")
        got, expected, real = got[:, :30], expected[:, :30], real[:, :30]
    close(got[real], expected[real])


@law("policy", "full budget", "With a budget of 100% the model answers as without the policy.")
def full_budget(component: Component) -> None:
    """One that is not `lossless` does so in the first piece, and only there."""
    hold_to_full_budget(component.build, None)


@law("policy", "full budget, padded", "With a budget of 100% it does so under left padding, too.")
def full_budget_padded(component: Component) -> None:
    """Seven tokens of the second row are padding."""
    hold_to_full_budget(component.build, PADS)


def holds_to_budget(component: Component) -> bool:
    """Whether it has a budget, and that of the bytes that it holds."""
    policy: Any = component.factory
    return policy.bounds == "held" and "budget" in inspect.signature(policy).parameters


def hold_to_budget(build: Build, budget: str, pads: tuple[int, ...] | None) -> None:
    """After each piece and token. budget: "24tok", "50%" or "40kB"."""
    reader, x = model(), tokens(length=52)
    policy = build(budget=budget)
    with policy.attach(reader):
        _, state, sizes = read(reader, x, [30, 10], masked(x, pads))
    require(sizes[-1] == state.nbytes, f"the last state has {state.nbytes} bytes, measured {sizes[-1]}")
    full = 2 * 2 * 2 * (8 + 8) * 8  # layers, rows, key heads, key and value, bytes: of each token
    lengths = [30, 40, *range(41, 53)]
    # Of a part, what is protected, one token more and the queries that are looked at are held in any case.
    query, beside = 2 * 2 * 4 * 8 * 8, 2 * 2 * 2 * (4 + 4)  # of each query; position and mass of each token
    least = (full + beside) * (getattr(policy, "protected", 0) + 1) + query * getattr(policy, "observe", 0) + 64
    allowed = {"40kB": [40_000] * len(lengths), "50%": [max(full * n // 2, least) for n in lengths]}.get(budget)
    if allowed is not None:
        for size, most, length in zip(sizes, allowed, lengths, strict=True):
            require(size <= most, f"with a budget of {budget} it holds {size} bytes after {length}, allowed {most}")
    if budget == "24tok":
        held = [layer.slots.used for layer in state.layers if hasattr(layer, "slots")]
        require(sum(held) <= 24 * len(held), f"with a budget of 24tok the layers hold {held} tokens")
        if getattr(policy, "pyramid", None) is None:
            require(max(held, default=0) <= 24, f"with a budget of 24tok the layers hold {held} tokens")


def _budget_law(budget: str, pads: tuple[int, ...] | None) -> None:
    padded = "" if pads is None else ", padded"

    @law(
        "policy",
        f"budget of {budget}{padded}",
        f"What it holds never exceeds a budget of {budget}{' under left padding' * (pads is not None)}.",
        holds_for=holds_to_budget,
    )
    def keeps(component: Component) -> None:
        hold_to_budget(component.build, budget, pads)


for _budget in ("24tok", "50%", "40kB"):
    for _pads in (None, PADS):
        _budget_law(_budget, _pads)


SHARES = (0.3, 0.75, 0.97)
"""Parts of the full cache that the law "budget used" asks for."""


def hold_to_budget_used(component: Component) -> None:
    """At each of `SHARES`, right after a text was read at once."""
    length, depth = 400, 3
    reader, x = model(depth=depth), tokens(1, length)
    slot = 2 * (8 + 8) * 8  # key heads, key and value, bytes: of a token in a layer
    for part in SHARES:
        policy = component.build(budget=part)
        if policy.untrained:
            policy.train_on(reader, tokens(2, 24), 4, steps=2)
        policy.prepare(reader, x, length)
        with policy.attach(reader), torch.no_grad():
            _, state = reader.read(x)
        asked = part * depth * length * slot
        beside = 2 * 4 + 2 * 4  # position and mass of a token
        least = asked - max(0.01 * asked, depth * (slot + beside))
        require(
            least <= state.nbytes <= asked,
            f"with a budget of {part:.0%} it holds {state.nbytes} bytes of {asked:.0f}, expected {least:.0f} or more",
        )


@law(
    "policy",
    "budget used",
    "Of a budget in per cent it holds all but 1%, or all but one token of each layer.",
    holds_for=holds_to_budget,
)
def budget_used(component: Component) -> None:
    """Right after a text was read at once; whichever of the two is more.

    While decoding an eviction policy makes slots free ahead (`every`), and then holds less for a while.
    """
    hold_to_budget_used(component)


def hold_to_older_states(build: Build) -> None:
    """Two ways on from one state; each is gone again."""
    reader, x = model(), tokens()
    with build(budget="24tok").attach(reader), torch.no_grad():
        _, before, _ = read(reader, x[:, :33], [30])
        kept = before.map(Tensor.clone)
        first, _ = read_on(reader, x[:, 33:40], before)
        other, _ = read_on(reader, x[:, 40:46], before)
        again, _ = read_on(reader, x[:, 33:40], before)
        other_again, _ = read_on(reader, x[:, 40:46], kept)
    close(again, first, 0, "outputs from an older state")
    close(other_again, other, 1e-12, "outputs from a copy of an older state")


@law("policy", "older states", "A state stays valid when others read on from it.")
def older_states(component: Component) -> None:
    """Bit for bit."""
    hold_to_older_states(component.build)


def hold_to_batch(build: Build) -> None:
    """Three rows with left padding, each alone again."""
    reader, x = model(), tokens(3, 46)
    pads = (0, 5, 19)
    with build(budget="24tok").attach(reader):
        together, _, _ = read(reader, x, [40], masked(x, pads))
        for row, pad in enumerate(pads):
            alone, _, _ = read(reader, x[row : row + 1, pad:], [40 - pad])
            close(
                together[row : row + 1, pad:], alone, what=f"outputs of row {row}, after {pad} tokens of left padding,"
            )


@law("policy", "batch", "A row is kept and answered as it is alone, whatever its batch and left padding.")
def batch(component: Component) -> None:
    """With a budget of 24 tokens."""
    hold_to_batch(component.build)


def hold_to_pieces(build: Build) -> None:
    """50 tokens at once, and in four pieces."""
    reader, x = model(), tokens(length=54)
    policy = build(budget="24tok")
    with policy.attach(reader):
        whole, _, _ = read(reader, x, [50])
        pieces, _, _ = read(reader, x, [13, 20, 1, 16])
    if policy.chunk_invariant:
        close(pieces, whole, what="outputs in pieces")


@law("policy", "pieces", "It does not depend on how the text is cut, if it says so.")
def pieces(component: Component) -> None:
    """That is what `chunk_invariant` says."""
    hold_to_pieces(component.build)


def hold_to_no_trace(build: Build) -> None:
    """Before, during, after."""
    reader, x = model(), tokens(length=46)
    expected, _, _ = read(reader, x, [40])

    def again() -> None:
        with build(budget="24tok").attach(reader):
            pass

    with build(budget="24tok").attach(reader):
        read(reader, x, [40])
        refused(again, "attached to this model already")
    got, _, _ = read(reader, x, [40])
    close(got, expected, 0, "outputs after it was detached")


@law("policy", "no trace", "Detached, it leaves the model as it was; a second one is refused meanwhile.")
def no_trace(component: Component) -> None:
    """Bit for bit."""
    hold_to_no_trace(component.build)


def hold_to_refusal(build: Build) -> None:
    """Of a model whose layers keep no keys and values."""
    reader = build_model("gated_delta_net", width=32, depth=1, input_size=4, output_size=4, read_in="token")

    def attach() -> None:
        with build().attach(reader):
            pass

    refused(attach, "needs a model with a KV state", "GatedDeltaNet")


@law("policy", "no KV state", "A model without a KV state is refused.")
def no_kv_state(component: Component) -> None:
    """With the name of what it has instead."""
    hold_to_refusal(component.build)


STEM, FIRST, REST = 27, 2, 5
READS_ONE_TEXT = {"oracle": "it has seen one text to its end, and reads no other branch"}
"""Policies that the law "trees" does not hold for, with the reason."""


def reads_branches(component: Component) -> bool:
    """Whether it can read on in another text from the same state."""
    return component.name not in READS_ONE_TEXT


def hold_to_trees(entry: registry.Entry, options: Mapping[str, Any]) -> None:
    """A policy of a registered kind with no budget, one with room for all, and one that is full by then."""
    reader = model(depth=1)
    x, other = tokens(2, STEM + FIRST + REST), tokens(2, FIRST + REST, seed=1)
    mask: Any = masked(x, (0, 3))
    known = {each.name for each in entry.parameters}
    small: dict[str, Any] = {"window": 4} if "window" in known else {}
    for budget in (None, "80tok", "20tok") if "budget" in known else (None,):
        policy = entry.build(**{**small, **options}).with_budget(budget)
        if policy.untrained:
            policy.train_on(reader, x, 4, steps=2)
        if entry.name == "kvzip":  # it reads texts of one length only
            mask = torch.ones_like(mask)
        policy.prepare(reader, x, STEM, mask)
        with policy.attach(reader), torch.no_grad():
            start = _beginning(reader, x, mask)
            expected, _ = read_on(reader, x[:, STEM:], start, mask[:, STEM:])
            start = _beginning(reader, x, mask)  # afresh: nothing has been read on from it
            first, state = read_on(reader, x[:, STEM : STEM + FIRST], start, mask[:, STEM : STEM + FIRST])
            branch, _ = read_on(reader, other, start, mask[:, STEM:])
            rest, _ = read_on(reader, x[:, STEM + FIRST :], state, mask[:, STEM + FIRST :])
            again, _ = read_on(reader, other, start, mask[:, STEM:])
        close(torch.cat((first, rest), 1), expected, 1e-12, f"with budget {budget}, outputs of a branch gone on with")
        close(again, branch, 1e-12, f"with budget {budget}, outputs of another branch")
        require(not torch.allclose(branch, expected), "other tokens are answered alike")


def _beginning(reader: Any, x: Tensor, mask: Tensor) -> Any:
    """The state of a prompt, and of three tokens after it, so that there is room in what they were written into."""
    _, state = reader.read(x[:, : STEM - 3], None, mask[:, : STEM - 3])
    return read_on(reader, x[:, STEM - 3 : STEM], state, mask[:, STEM - 3 : STEM])[1]


@law(
    "policy",
    "trees",
    "What is read on from a state knows nothing of what else was read on from it.",
    holds_for=reads_branches,
)
def trees(component: Component) -> None:
    """Branch A, then B from one state, on with A: as A alone."""
    hold_to_trees(registry.lookup("policy", component.name), component.options)


def marks(entry: registry.Entry, options: Mapping[str, Any]) -> Iterator[Any]:
    """What a policy's options may change: what the model answers under it, over 44 tokens, and what it holds."""
    reader, x = model(), tokens(2, 44)
    known = {parameter.name for parameter in entry.parameters}
    small = {"window": 4} if "window" in known else {}
    tight = {"budget": "24tok"} if "budget" in known else {}
    state: Any = None
    with entry.build(**{**tight, **small, **options}).attach(reader):
        for piece in x.split([30, 9, *[1] * 5], 1):
            with torch.no_grad():
                y, state = reader.read(piece, state)
            yield [y, state.nbytes]
    yield list(state.tensors())


@law("policy", "options", "Every option counts: another value changes something, or is refused.", holds_for=a_case)
def options(component: Component) -> None:
    """Of what the model answers and of what is held."""
    entry = registry.lookup("policy", component.name)
    hold_to_options(component, lambda options: marks(entry, options))
