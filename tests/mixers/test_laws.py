"""The laws that every registered mixer is held to, under each of the option cases it was registered with.

The laws are those of `contextlab.testing`; a new mixer gets all of them with no new test code. `BROKEN` at the end
shows that each law can fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import contextlab.mixers  # noqa: F401  (registers every mixer)
from contextlab import registry
from contextlab.mixers.base import Mixer
from contextlab.state import RecurrentState, State, own
from contextlab.testing import Component, Law, LawBroken, laws, parametrize_with_laws
from contextlab.testing.readings import WIDTH, Reading


@parametrize_with_laws("mixer")
def test_laws(law: Callable[[], None]) -> None:
    law()


@pytest.mark.parametrize("entry", registry.entries("mixer"), ids=lambda entry: entry.name)
def test_a_mixer_has_a_family(entry: registry.Entry) -> None:
    assert entry.family


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


class WrongGradient(Sum):
    """Says that the gradient of its answer is twice what it is."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        return y.detach() + 2 * (y - y.detach()), after


class HasIdleWeights(Sum):
    """Has parameters that nothing reads."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.idle = nn.Parameter(torch.zeros(3))


class CountsNoFlops(Sum):
    """Costs the same at any length."""

    def flops(self, length: int) -> int:
        return 1


class TakesAnything(Sum):
    """Checks nothing."""

    def _check(self, x: Tensor, state: State | None, mask: Tensor | None) -> None: ...


class Float32Only(Sum):
    """Has a part that stays in float32."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        return y @ torch.eye(WIDTH), after


class LosesDigits(Sum):
    """Rounds to one bit when it is not in full precision."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        return y.sign() if y.dtype == torch.bfloat16 else y, after


class RootOfZero(Sum):
    """Takes a root whose gradient at zero half precision does not hold."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        return y + (x.square().sum(-1, keepdim=True) + 1e-30).sqrt(), after


class Overflows(Sum):
    """Divides what float16 does not hold by its size."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        return y * 2000 / (1 + (y * 2000).abs().amax(-1, keepdim=True)), after


class OverflowsUnderAutocast(Sum):
    """Reads float32 sums by a product that autocast rounds to float16, which does not hold them."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        return ((y.float() * 2000) @ torch.eye(WIDTH) / 2000).to(x.dtype), after


class NoticesWhoLooks(Sum):
    """Answers otherwise when its places are looked at."""

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        y, after = super().forward(x, state, mask, keep_state)
        return y if self.tap is None else y + 1e-12, after


class TellsOtherMatrices(Sum):
    """Its heads' answers are no linear function of its values."""

    tells_mixing = True

    def forward(self, x: Tensor, state: Any = None, mask: Any = None, keep_state: bool = True) -> Any:
        v = self.site("v", x.unsqueeze(2))
        heads = self.site("heads", (v * v.abs()).cumsum(1))
        return heads.flatten(2), super().forward(x, state, mask, keep_state)[1]


class Lawful(Sum):
    """Keeps all laws."""

    parallel_form = "scan"


def example(padded: bool = False) -> Reading:
    mask = torch.arange(9) >= torch.tensor([4, 0, 2])[:, None] if padded else None
    return Reading(torch.randn(3, 9, WIDTH, dtype=torch.float64), [2, 3, 7], mask, 4)


class ReadsItsWeight(Sum):
    """Multiplies with the layer's weight and never calls the layer."""

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        proj, self.proj = self.proj, nn.Identity()  # type: ignore[assignment]
        total, after = super().forward(x, state, mask, keep_state)
        self.proj = proj
        return total @ proj.weight.T, after


BY_NAME: dict[str, Law] = {law.name: law for law in laws("mixer")}
EXAMPLES = {
    "split": ("split", False),
    "split, padded": ("split", True),
    "causality": ("causality", False),
    "size": ("size", False),
    "batch": ("batch", False),
    "padding": ("batch", True),
    "gradient": ("gradients in pieces", False),
    "branch": ("branches", False),
    "tree": ("trees", False),
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
# The laws whose cases are searched for, or that have none, on whole mixers.
CAUGHT: list[tuple[type[Mixer], str]] = [
    (Forgets, "split"),
    (Forgets, "split, float32"),
    (Peeks, "causality"),
    (Hoards, "size"),
    (Hoards, "size, float32"),
    (Mixes, "batch"),
    (Overwrites, "branches"),
    (HidesItsMemory, "trees"),
    (Detaches, "gradients in pieces"),
    (WrongGradient, "gradients"),
    (WrongGradient, "gradients, padded"),
    (HasIdleWeights, "parameters"),
    (CountsNoFlops, "flops"),
    (TakesAnything, "strange states"),
    (TakesAnything, "strange inputs"),
    (Sum, "no state"),
    (Sum, "both ways"),
    (Float32Only, "bfloat16"),
    (LosesDigits, "autocast"),
    (RootOfZero, "zeros"),
    (Overflows, "large inputs"),
    (OverflowsUnderAutocast, "large inputs"),
    (Sum, "description"),
    (ReadsItsWeight, "adapters"),
    (ReadsItsWeight, "int8"),
    (ReadsItsWeight, "linear forms"),
    (Mixes, "packed"),
    (NoticesWhoLooks, "places"),
    (TellsOtherMatrices, "mixing"),
]


def component(mixer: type[Mixer]) -> Component:
    return Component("mixer", mixer.__name__, mixer, make=lambda noise=True: mixer())


@pytest.mark.parametrize("name", EXAMPLES)
def test_harness_passes_a_lawful_mixer(name: str) -> None:
    law, padded = EXAMPLES[name]
    BY_NAME[law].check(component(Lawful), example(padded))


def test_a_lawful_mixer_keeps_all_laws_of_causal_ones() -> None:
    kept = [law for law in laws("mixer") if law.holds_for(component(Lawful))]
    left = {law.name for law in laws("mixer")} - {law.name for law in kept}
    assert len(left) == 3  # two are of encoders
    assert "options" in left  # it has none
    for law in kept:
        law(component(Lawful))


@pytest.mark.parametrize(("broken", "name"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_harness_catches_a_broken_mixer(broken: type[Mixer], name: str) -> None:
    law, padded = EXAMPLES[name]
    with pytest.raises((AssertionError, TypeError)):
        BY_NAME[law].check(component(broken), example(padded))


@pytest.mark.parametrize(("broken", "name"), CAUGHT, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_mixer_is_found_out(broken: type[Mixer], name: str) -> None:
    with pytest.raises(LawBroken, match=f"mixer {broken.__name__} breaks the law '{name}'") as caught:
        BY_NAME[name](component(broken))
    assert "\n" not in str(caught.value)


def test_a_mixer_that_an_adapter_does_not_change_is_told_so() -> None:
    with pytest.raises(LawBroken, match="outputs are the same with LoRA as without"):
        BY_NAME["adapters"](component(ReadsItsWeight))


def test_each_law_is_broken_by_a_mixer() -> None:
    assert {name for _, name in CAUGHT} == set(BY_NAME) - {"options"}  # whose mixers stand in tests/testing


def test_the_smallest_case_is_told() -> None:
    with pytest.raises(LawBroken) as caught:
        BY_NAME["split"](component(Forgets), examples=20)
    assert caught.value.case == "reading: batch 1, 2 tokens, cut at [1], position 0, x of seed 0, parameters of seed 0"
    assert caught.value.reason.startswith("outputs in pieces differ by")
