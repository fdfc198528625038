"""The laws of probes. Each is put to small models of several mixers on two tasks, to those of them that it takes."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from contextlab import registry
from contextlab.errors import InputError
from contextlab.evaluation.evaluate import _evaluating
from contextlab.inspect.layout import sites
from contextlab.inspect.looking import look, over_seeds
from contextlab.inspect.probe import COLUMNS, Probe, Subject, parse_probe, records
from contextlab.models import Model, preset
from contextlab.policies.core.parse import write_options
from contextlab.tasks import build_task
from contextlab.testing.law import Component, law, require
from contextlab.testing.models import noisy

PRESETS = ("transformer", "gated_delta_net", "mamba2")
TASKS = ("associative_recall", "linear_regression")


class Tried(NamedTuple):
    """A probe, what it was put to, and what came of it."""

    probe: Probe
    subject: Subject
    table: pd.DataFrame


def cases(entry: registry.Entry) -> Iterator[Component]:
    """A registered probe in each option case, on each task of those that it takes; `beside` is the model's preset.

    In the first case it is put to a model of every preset, in others to the first that it takes.
    """
    for place, options in enumerate(entry.cases):
        found = False
        for name in TASKS:
            for each in PRESETS:
                if _takes(entry, options, name, each) and not (found and place):
                    found = True
                    shown = {**options, "on": name}
                    make = functools.partial(_tried, entry.name, write_options(options), name, each)
                    yield Component("probe", entry.name, entry.factory, shown, make, each)
        if not found:
            raise InputError(f"probe {entry.name!r}: with {dict(options)} it takes none of the models that laws try")


def _takes(entry: registry.Entry, options: Mapping[str, Any], task: str, name: str) -> bool:
    subject = _subject(task, name)
    return not entry.build(**options).refusal(subject)


@functools.cache
def _task(name: str) -> Any:
    return build_task(name, preset="easy")


@functools.cache
def _model(task: str, name: str, step: int = 0) -> Model:
    return _new(task, name, step)


def _new(task: str, name: str, step: int = 0) -> Model:
    """A small model; of other steps with other noise on its weights."""
    spec = preset(name, width=16, depth=2, heads=2, mlp_ratio=2).for_task(_task(task))
    model = noisy(spec).float().eval()
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters() if step else ():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def _subject(task: str, name: str) -> Subject:
    steps = {step: functools.partial(_model, task, name, step) for step in (1, 2, 3)}
    return Subject(_model(task, name), _task(task), 0, steps)


@functools.cache
def _tried(name: str, options: str, task: str, model: str) -> Tried:
    subject = _subject(task, model)
    probe = parse_probe(f"{name}:{options}" if options else name)
    with _evaluating(subject.model):
        return Tried(probe, subject, probe.measure(subject))


@law("probe", "table", "Its table is tidy: places that the model has, values within their intervals.")
def tidy(component: Component) -> None:
    """Rows, the columns of `probe_table`, and no row twice."""
    _, subject, table = component.build()
    require(list(table.columns) == list(COLUMNS), f"columns {list(table.columns)}; expected {list(COLUMNS)}")
    require(len(table), "it has no row")
    require(table["value"].notna().all(), "a value is missing")
    known = sites(subject.model)
    for site in table["site"].dropna().unique():
        require(site in known or f"{site}.output" in known, f"{site!r} is no place of the model")
    rows = table.dropna(subset=["ci_low", "ci_high"])
    slack = 1e-9 + 1e-6 * rows["value"].abs()
    inside = (rows["ci_low"] <= rows["value"] + slack) & (rows["value"] <= rows["ci_high"] + slack)
    require(inside.all(), "a value lies outside its interval")
    require((table["n"].dropna() >= 1).all(), "n is below 1")
    keys = ["site", "layer", "head", "place", "at", "what", "measure"]
    require(not table.duplicated(keys).any(), f"two rows are of the same {', '.join(keys)}")


@law("probe", "leaves no trace", "The model is as it was: weights, gradients, mode, hooks, answers, bit for bit.")
def no_trace(component: Component) -> None:
    """The global generator is where it was, too."""
    probe, subject, _ = component.build()
    model = _new(str(component.options["on"]), component.beside)
    tokens = subject.prompts(2, draw=7).inputs
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    needed = [each.requires_grad for each in model.parameters()]
    with torch.no_grad():
        answered = model.eval()(tokens)
    drawn = torch.get_rng_state()
    look(model.train(), subject.task, [_text(probe)], seed=subject.seed, checkpoints=subject.checkpoints)
    require(torch.equal(torch.get_rng_state(), drawn), "it draws from the global generator")
    require(torch.is_grad_enabled(), "gradients are switched off")
    require(model.training and all(part.training for part in model.modules()), "the model is in training no more")
    for name, tensor in model.state_dict().items():
        require(torch.equal(tensor, before[name]), f"{name} has changed")
    require([each.requires_grad for each in model.parameters()] == needed, "what needs gradients has changed")
    require(all(each.grad is None for each in model.parameters()), "gradients are left")
    require(not any(_hooks(part) for part in model.modules()), "hooks are left")
    with torch.no_grad():
        require(torch.equal(model.eval()(tokens), answered), "the model answers otherwise")


def _hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in vars(module) if name.endswith("_hooks"))


def _text(probe: Probe) -> str:
    entry = registry.entry_of("probe", probe)
    assert entry is not None
    options = {each.name: getattr(probe, each.name) for each in entry.parameters}
    return f"{entry.name}:{write_options(options)}" if options else entry.name


@law("probe", "same seed", "Measured again, it is the same; other prompts give other values.")
def same_seed(component: Component) -> None:
    """To rounding."""
    probe, subject, table = component.build()
    with _evaluating(subject.model):
        again = probe.measure(subject)
    pd.testing.assert_frame_equal(again, table, check_exact=False, rtol=1e-6, atol=1e-9)


@law("probe", "words", "It says what it found in whole sentences, without what is no number.")
def words(component: Component) -> None:
    """Of one seed and of three."""
    probe, _, table = component.build()
    who = {"run": "", "model": "model", "task": "task", "probe": _text(probe)}
    for seeds in (1, 3):
        whole = pd.concat([table.assign(**who, seed=seed) for seed in range(seeds)], ignore_index=True)
        said = probe.words(records(over_seeds(whole)))
        require(said, "it says nothing")
        for sentence in said:
            require(sentence.endswith("."), f"no whole sentence: {sentence!r}")
            strange = re.search(r"\b(?:nan|inf|None|<NA>)\b|  |\( ?\)", sentence)
            require(strange is None, f"{sentence!r} has {strange and strange[0]!r} in it")


@law("probe", "drawing", "What is drawn stands in its table.")
def drawing(component: Component) -> None:
    """The columns that its `drawing` names."""
    probe, _, table = component.build()
    named = [probe.drawing.x, *probe.drawing.figures, *([probe.drawing.y] if probe.drawing.form == "map" else [])]
    for column in (part for name in named for part in name.split(".")):
        require(column in table, f"drawing: there is no column {column!r}")
        require(table[column].notna().any(), f"drawing: the column {column!r} has nothing in it")
