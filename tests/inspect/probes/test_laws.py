"""Every registered probe keeps the laws of probes; probes that break one each are found out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
import torch

from contextlab import registry
from contextlab.inspect import Probe, Subject, probe_table
from contextlab.inspect.probes.heads import Heads
from contextlab.inspect.probes.linear import Linear
from contextlab.testing import LawBroken, components, laws, parametrize_with_laws
from contextlab.testing.probes import _model, _tried

CACHES = (_model, _tried)
"""What the laws know of models and tables: a broken probe may have changed them."""


@parametrize_with_laws("probe")
def test_the_probe_keeps_the_laws(law):
    law()


@dataclass(frozen=True)
class Elsewhere(Heads):
    """It tells of a layer that the model has not."""

    def measure(self, subject: Subject) -> pd.DataFrame:
        return super().measure(subject).assign(site="blocks.7.mixer")


@dataclass(frozen=True)
class Outside(Linear):
    """Its values lie outside their intervals."""

    def measure(self, subject: Subject) -> pd.DataFrame:
        found = super().measure(subject)
        return found.assign(value=found["ci_high"] + 1)


@dataclass(frozen=True)
class Trains(Heads):
    """It moves a weight."""

    def measure(self, subject: Subject) -> pd.DataFrame:
        with torch.no_grad():
            next(subject.model.parameters()).add_(1e-3)
        return super().measure(subject)


@dataclass(frozen=True)
class Hooks(Heads):
    """It leaves a hook."""

    def measure(self, subject: Subject) -> pd.DataFrame:
        subject.model.blocks[0].register_forward_hook(lambda *given: None)
        return super().measure(subject)


@dataclass(frozen=True)
class Freezes(Heads):
    """It leaves weights that take no gradients."""

    def measure(self, subject: Subject) -> pd.DataFrame:
        subject.model.requires_grad_(False)
        return super().measure(subject)


@dataclass(frozen=True)
class Draws(Heads):
    """It draws from the global generator."""

    def measure(self, subject: Subject) -> pd.DataFrame:
        found = super().measure(subject)
        return found.assign(control=torch.rand(len(found)).numpy())


@dataclass(frozen=True)
class Mumbles(Heads):
    """It says what is no sentence."""

    def words(self, rows: list[Any]) -> list[str]:
        return [f"share {float('nan')}"]


@dataclass(frozen=True)
class Blank(Linear):
    """It draws by a column that it leaves empty."""

    drawing = Heads.drawing


BROKEN: list[tuple[type[Any], str]] = [
    (Elsewhere, "table"),
    (Outside, "table"),
    (Trains, "leaves no trace"),
    (Hooks, "leaves no trace"),
    (Freezes, "leaves no trace"),
    (Draws, "same seed"),
    (Mumbles, "words"),
    (Blank, "drawing"),
]


@pytest.mark.parametrize(("probe", "name"), BROKEN, ids=[each.__name__ for each, _ in BROKEN])
def test_a_broken_probe_is_found_out(probe, name, monkeypatch):
    base = "linear" if issubclass(probe, Linear) else "heads"
    known = registry.lookup("probe", base)
    entry = registry.Entry("probe", base, probe, known.papers, known.cases, known.family)
    monkeypatch.setitem(registry._entries["probe"], base, entry)
    for cached in CACHES:
        cached.cache_clear()
    try:
        broken = next(law for law in laws("probe") if law.name == name)
        with pytest.raises(LawBroken):
            broken(components("probe", base)[0])
    finally:
        for cached in CACHES:
            cached.cache_clear()


def test_rows_have_known_columns():
    with pytest.raises(ValueError, match="extra"):
        probe_table([{"site": "blocks.0.mixer", "value": 1.0, "extra": 2}])
    assert probe_table([{"site": "blocks.3.mixer", "value": 1.0}])["layer"].tolist() == [3]


def test_a_probe_is_a_class_of_its_kind():
    with pytest.raises(registry.InputError, match=r"contextlab.inspect.Probe"):
        registry.register("probe", "none")(lambda: None)
    assert issubclass(registry.lookup("probe", "heads").factory, Probe)


@pytest.mark.parametrize("entry", registry.entries("probe"), ids=lambda entry: entry.name)
def test_every_option_has_a_line_of_its_own(entry):
    assert [each.name for each in entry.parameters if not each.help] == []
    for each in entry.parameters:  # another's line that runs on from this one
        others = [other.name for other in entry.parameters if other is not each]
        assert not any(f" {other}: " in each.help for other in others), each.help
