"""Laws of mixers' named places: who looks changes nothing, and matrices that are told are those of the heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers.sites import Sited, Tap, tapped
from contextlab.testing.law import Component, close, law, require
from contextlab.testing.readings import WIDTH, Reading, read

TOKENS = 19
"""Of the text: more than one chunk of the mixers that read in small ones."""


Values = dict[tuple[str, str], list[Tensor]]
"""(path of the part, place) -> what flowed there, [B, T, ...], call by call."""


def _taking(taken: Values, path: str, part: Sited) -> Tap:
    def tap(name: str, value: Tensor) -> Tensor:
        taken.setdefault((path, name), []).append(value)
        return value

    return tap


def _putting(values: Values, path: str, part: Sited) -> Tap:
    return lambda name, value: values[path, name].pop(0)


@law("mixer", "places", "What flows through its named places can be taken, and put back, and nothing changes.")
@torch.no_grad()
def named_places(component: Component) -> None:
    """Whole, and of a causal mixer in pieces, bit for bit."""
    mixer, x = component.build().double().eval(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    ways: dict[str, Callable[[], Tensor]] = {"whole": lambda: mixer(x, keep_state=False)[0]}
    if mixer.causal:
        ways["in pieces"] = lambda: read(mixer, Reading(x, [5, 6], None))[0]
    for way, answer in ways.items():
        expected, taken = answer(), Values()
        with tapped(mixer, partial(_taking, taken)):
            require(torch.equal(answer(), expected), f"answers {way} change when its places are looked at")
        own = {place: [value.clone() for value in values] for place, values in taken.items()}
        with tapped(mixer, partial(_putting, own)):
            require(torch.equal(answer(), expected), f"answers {way} change when its places get their own values")


@law(
    "mixer",
    "mixing",
    "The matrices that it tells give its heads' answers; else it tells none.",
)
@torch.no_grad()
def told_matrices(component: Component) -> None:
    """What flows through place "heads" is the matrices times what flows through "v"."""
    mixer, x = component.build().double().eval(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    if not mixer.tells_mixing:
        try:
            mixer.mixing(x)
        except InputError:
            return
        raise AssertionError("it gives matrices, and does not declare tells_mixing")
    found, seen = mixer.mixing(x), dict[str, Tensor]()
    require(mixer.tap is None, "mixing leaves a tap behind")
    mixer.tap = lambda name, value: seen.setdefault(name, value)
    mixer(x, keep_state=False)
    mixer.tap = None
    v, heads = seen["v"], seen["heads"]
    answers = torch.einsum("bhts,bshd->bthd", found, v.repeat_interleave(heads.shape[2] // v.shape[2], 2))
    close(answers, heads, 1e-9, "the matrices times the values")
    require(not mixer.causal or torch.equal(found, found.tril()), "its matrices look at later tokens")
