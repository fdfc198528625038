"""`convert`: a model to other mixers, trained from its teacher, and what was kept, lost, spent and saved."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from contextlab import registry
from contextlab.convert.base import Change, Conversion
from contextlab.convert.choice import ByData, Choice, Training, differing, read_choice
from contextlab.convert.divergence import Compared, compare
from contextlab.convert.linearize.base import DISTIL
from contextlab.convert.linearize.plain import Linearize
from contextlab.convert.methods import as_list, calibration_of, tasks_of
from contextlab.convert.saving import Origin, check_writable, save_converted
from contextlab.convert.shrink import LENGTHS, state_bytes
from contextlab.convert.transfer import Stage, StageResult
from contextlab.errors import InputError, unknown
from contextlab.models import Model, ModelSpec
from contextlab.models.io import require_own
from contextlab.policies.core.parse import parse_options
from contextlab.progress import Steps as Progress
from contextlab.prompt import Task

RECORD = "convert.json"
BUDGET = 600
"""Steps where a conversion needs training and none are given."""
FAMILIES = ("linearize", "kv")
OTHER_NAMES = {
    "arwkv": "radlads",
    "cla": "share_kv",
    "drope": "drop_position",
    "lightransfer": "light_transfer",
    "mha2mla": "mla",
    "mqa": "gqa:kv_heads=1",
    "ntk": "rope_scaling:kind=ntk,factor=4",
    "pi": "rope_scaling:kind=linear,factor=4",
    "position_interpolation": "rope_scaling:kind=linear,factor=4",
    "transmla": "mla",
    "yarn": "rope_scaling:kind=yarn,factor=4,original_length=8192",
    "yoco": "share_kv",
}
"""Names of papers, and what `--to` takes for them. None is a conversion's or a mixer's own."""


@dataclass(frozen=True)
class Transferred:
    """A converted model, and what was done, kept and spent.

    model: in evaluation mode. method, options: the conversion. layers: numbers of those that changed. lines: what was
        done to each, with its error before training. stages: the training. compared: teacher and student on each task.
        choices: of `layers="auto:N"` and "gates:N".
    state: tokens -> bytes of a sequence's state, before and after. weights: bytes, before and after.
    seconds: of all of it, training included.
    """

    file: ClassVar[str] = RECORD
    """Name of the record in the folder."""

    model: Model
    method: str
    options: dict[str, Any]
    layers: list[int]
    lines: list[Change]
    stages: list[StageResult]
    compared: list[Compared]
    choices: list[Choice] = field(default_factory=list)
    state: dict[int, tuple[int, int]] = field(default_factory=dict)
    weights: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens that were read in training."""
        return sum(stage.tokens for stage in self.stages)

    def record(self) -> dict[str, Any]:
        """All but the model, as plain data."""
        told = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}
        for name in ("lines", "stages", "compared", "choices"):
            told[name] = [dataclasses.asdict(each) for each in told[name]]
        told["state"] = {str(length): list(pair) for length, pair in self.state.items()}
        return {**told, "weights": list(self.weights), "tokens": self.tokens}

    def save(self, folder: str | Path, *, transformers: Origin = False, **more: Any) -> Path:
        """Write the model and the record into a folder that is not there yet.

        transformers: see `saving.save_converted`. more: further keys of the record.
        """
        return save_converted(self.model, folder, self.file, {**more, **self.record()}, transformers)


def convert(
    model: Model,
    to: str | Conversion,
    data: Task | str | Sequence[Task | str] | None = None,
    *,
    layers: str | Sequence[int] | None = None,
    budget: int | None = None,
    stages: Sequence[Stage] | None = None,
    train: Mapping[str, Any] | None = None,
    prompts: int = 64,
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
    folder: str | Path | None = None,
    transformers: bool = False,
    progress: Progress | bool | None = False,
    **options: Any,
) -> Transferred:
    """Convert attention layers of a trained model to another mixer, or make their state smaller, and train what is new.

    model: a `Model`, the teacher; it is left as it is.
    to: a conversion of family "linearize" or "kv", its name, or a mixer's, with options: "hedgehog", "mla:rank=32",
        "gated_delta_net:short_conv=4".
    data: tasks, or files or folders of text, that the student is trained, calibrated and measured on.
    layers: "all", "half" (the last of each two stays), numbers; or "auto:N", the N whose change alone takes the model
        least far from its teacher, once their mixers have learned from the attention; or "gates:N", the N whose gates
        between the old mixer and the new one open widest when they are trained, all at once, on the data.
    budget: optimiser steps of all stages; None is 600 where the conversion needs training, else 0. 0 trains nothing.
    stages: what is learned, in the place of the conversion's own (`transfer.Stage`).
    train: keys of a TrainSpec that hold for every stage, such as batch, learning_rate and optimizer.
    prompts: of each task, on which output projections are fitted, and others on which the models are compared.
    lengths: tokens at which the bytes of state are told.
    seed: of what is drawn.
    folder: where the stages keep checkpoints; the same call then goes on after an interruption, bit for bit: a stage
        that ended is read, one that was cut short goes on from its last checkpoint.
    transformers: refuse, before the work, what transformers could not hold (`Transferred.save` writes it).
    progress: of the training, as `train` takes it.
    options: of the conversion, where it is given by name.

    Raises InputError on targets that cannot take the weights, layers that cannot change or do not exist, a budget too
    small for the stages, data of another vocabulary or none where they are needed.
    """
    require_own(model, "convert")
    began = time.perf_counter()
    method, auto = read_request(to, layers, options)
    steps = steps_of(method, budget, bool(as_list(data)), stages is not None or bool(train))
    tasks = tasks_of(data, model)
    learned = tuple(getattr(method, "stages", ()) if stages is None else stages)
    if steps and not learned:
        learned = (DISTIL,)
    planned = method.plan(model.spec)
    if transformers:
        check_writable(planned)
    if auto is not None:
        auto.check(method, differing(model.spec, planned), tasks, steps)
    calibration = calibration_of(None, tasks, model, prompts, seed)
    if calibration is not None:
        calibration.check(model)
    converted = method(model, calibration, torch.Generator().manual_seed(seed))
    changed = differing(model.spec, converted.model.spec)
    _check_stages(converted.model.spec, learned, changed)
    training = Training(steps, learned, train, None if folder is None else Path(folder), progress, seed)
    choices: list[Choice] = []
    results: list[StageResult] = []
    if auto is not None:
        converted, choices, results, training = auto.choose(model, method, converted, tasks, prompts, training)
        changed = differing(model.spec, converted.model.spec)
    if training.budget:
        results += training.run(model, converted.model, tasks, changed)
    return Transferred(
        converted.model, method.name, _told(method), changed, converted.lines, results,
        [compare(model, converted.model, task, prompts, seed) for task in tasks], choices,
        state_bytes(model, converted.model, lengths),
        (model.weight_nbytes, converted.model.weight_nbytes), time.perf_counter() - began,
    )  # fmt: skip


def read_request(
    to: str | Conversion, layers: Any = None, options: Mapping[str, Any] | None = None
) -> tuple[Conversion, ByData | None]:
    """What `convert` is asked for: the conversion, and what chooses its layers where the data do; see there.

    Raises InputError for names and options that are none, whatever the model.
    """
    auto = read_choice(layers)
    if auto is not None and isinstance(to, str):
        _require_once({**parse_options(to, "to")[1], **(options or {})}, layers)
    method = read_target(to, None if auto else layers, options)
    return (method if auto is None else dataclasses.replace(method, layers="all")), auto  # type: ignore[call-arg]


def steps_of(method: Conversion, budget: int | None, data: bool, told: bool = False) -> int:
    """The steps of training that a conversion is given.

    budget: as of `convert`. data: whether there are any. told: whether anything is said of how it is trained.
    Raises InputError where what it needs is not given, whatever the model.
    """
    if budget is not None and budget < 0:
        raise InputError(f"budget: expected steps, at least 0, got {budget}")
    steps = (BUDGET if "training" in method.needs else 0) if budget is None else budget
    if steps and not data:
        raise InputError(
            f"{method.name}: trains for {steps} steps, on what? give data (--data TASK or FILE), or budget 0"
        )
    if not steps and told:
        raise InputError(
            f"budget: {method.name} trains for 0 steps{'' if budget == 0 else ' unless told'}, so that what is said "
            f"of the training (--stage, --set) would be lost; give a budget, for example {BUDGET}, or leave that out"
        )
    return steps


def read_target(to: str | Conversion, layers: Any = None, options: Mapping[str, Any] | None = None) -> Conversion:
    """The conversion that "NAME" or "NAME:option=value,..." describes, where NAME may be a mixer's, too.

    Raises InputError with the nearest name, or on impossible options.
    """
    if isinstance(to, Conversion):
        if options or layers is not None:
            raise InputError(f"{to.name}: is made already; give its options and layers where it is made")
        return to
    name, given = parse_options(to, "to")
    own = {**given, **(options or {})}
    if layers is not None:
        _require_once(own, layers)
        own["layers"] = layers if isinstance(layers, str) else list(layers)
    known = {entry.name: entry for entry in registry.entries("conversion") if entry.family in FAMILIES}
    if name in known:
        made: Conversion = known[name].build(**own)
        return made
    if name in registry.names("mixer"):
        where = {key: own.pop(key) for key in ("layers",) if key in own}
        return registry.lookup("conversion", "linearize").build(mixer=name, mixer_options=own, **where)
    if name in registry.names("conversion"):
        raise InputError(f"{name!r} makes weights smaller: use `contextlab shrink --method {name}`")
    if (plain := name.lower().replace("-", "_")) in OTHER_NAMES:
        raise InputError(f"to: {name!r} is called {OTHER_NAMES[plain]!r} here")
    raise InputError(unknown("conversion or mixer", name, [*known, *registry.names("mixer")]))


def _require_once(options: Mapping[str, Any], layers: Any) -> None:
    """Raises InputError where options tell the layers that are told beside them."""
    if "layers" in options:
        raise InputError(f"layers: told twice, as {options['layers']!r} and as {layers!r}; leave one out")


def _told(method: Conversion) -> dict[str, Any]:
    """Its options that are not their defaults; of `Linearize` also the mixer, which is most of what it is."""
    return {**({"mixer": method.mixer} if isinstance(method, Linearize) else {}), **method.options}


def _check_stages(spec: ModelSpec, stages: Sequence[Stage], changed: Sequence[int]) -> None:
    shared = [i for i in changed if spec.pattern()[i].kv == "shared"]
    if shared and any(stage.distil.by_layer for stage in stages):
        raise InputError(
            f"stages: layer {shared[0]} reads another's keys, so that it cannot learn attention alone; use logits"
        )
