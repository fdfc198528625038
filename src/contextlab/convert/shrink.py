"""`shrink`: one conversion after another, healing, and the record of what was done and lost."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from contextlab.convert.base import Change, Conversion
from contextlab.convert.beside import put_beside
from contextlab.convert.calibration import Calibration
from contextlab.convert.divergence import Compared, compare
from contextlab.convert.heal import check_healing, heal_model, heal_spec
from contextlab.convert.methods import as_list, calibration_of, read_method, tasks_of
from contextlab.convert.saving import Origin, check_writable, save_converted
from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec
from contextlab.models.io import require_own
from contextlab.progress import Steps as Progress
from contextlab.prompt import Task
from contextlab.training import TrainSpec

RECORD = "shrink.json"
LENGTHS = (1024, 16384)
"""Tokens at which bytes of state are told."""


@dataclass(frozen=True)
class Step:
    """One method: its name and options, what it did to which layer, bytes of all weights before and after, seconds."""

    method: str
    options: dict[str, Any]
    lines: list[Change]
    bytes_before: int
    bytes_after: int
    seconds: float


@dataclass(frozen=True)
class Healed:
    """The training after the methods: its steps, seconds, last recorded loss, and how it ended."""

    steps: int
    seconds: float
    loss: float
    status: str


@dataclass(frozen=True)
class Shrunk:
    """A converted model, and what was done and lost.

    model: in evaluation mode. steps: the methods in order. losses: on the data, where there are any: "before",
        "converted" and, after healing, "healed". data: what was read. healed: the training after the methods.
    compared: the model before and after all of it, on each task of the data. state: tokens -> bytes of a sequence's
        state, before and after.
    """

    file: ClassVar[str] = RECORD
    """Name of the record in the folder."""

    model: Model
    steps: list[Step]
    losses: dict[str, float] = field(default_factory=dict)
    data: str = ""
    healed: Healed | None = None
    compared: list[Compared] = field(default_factory=list)
    state: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def lines(self) -> list[Change]:
        """What was done, of all methods."""
        return [line for step in self.steps for line in step.lines]

    @property
    def bytes_before(self) -> int:
        return self.steps[0].bytes_before

    @property
    def bytes_after(self) -> int:
        return self.steps[-1].bytes_after

    def record(self) -> dict[str, Any]:
        """All but the model, as plain data."""
        told = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}
        plain = {**told, "steps": [dataclasses.asdict(step) for step in self.steps]}
        plain["healed"] = None if self.healed is None else dataclasses.asdict(self.healed)
        plain["compared"] = [dataclasses.asdict(each) for each in self.compared]
        plain["state"] = {str(length): list(pair) for length, pair in self.state.items()}
        return {**plain, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after}

    def save(self, folder: str | Path, *, transformers: Origin = False, **more: Any) -> Path:
        """Write the model and the record into a folder that is not there yet.

        transformers: see `saving.save_converted`. more: further keys of the record.
        """
        return save_converted(self.model, folder, self.file, {**more, **self.record()}, transformers)


def shrink(
    model: Model,
    method: str | Conversion | Sequence[str | Conversion],
    data: Calibration | Task | str | Sequence[Task | str] | None = None,
    *,
    heal: int | Mapping[str, Any] | TrainSpec = 0,
    prompts: int = 64,
    seed: int = 0,
    transformers: bool = False,
    progress: Progress | bool | None = False,
    **options: Any,
) -> Shrunk:
    """Convert a model by one method or several in a row, and heal what comes out.

    model: a `Model`; it is left as it is.
    method: a conversion, or its name with options, "svd:rank=8"; of several each takes what the one before it made.
    data: tasks, or files or folders of text, that the model is calibrated, healed and measured on; or a `Calibration`,
        which cannot heal.
    heal: steps of training afterwards, or keys of a TrainSpec (see `heal_spec`), {"steps": 200, "lora": {"rank": 8}}:
        adapters are merged at the end, those of LoRA on layers that are stored as a form stay beside it and are told
        as a last step, "lora". Zeros of sparse methods stay zero.
    prompts: of each task, to calibrate on, and as many others to compare the models on.
    seed: of the prompts and of what methods draw.
    transformers: refuse, before the work, what transformers could not hold (`Shrunk.save` writes it).
    progress: of the healing, as `train` takes it.
    options: of the method, where it is one and given by name.

    Raises InputError on unknown methods and options, data that are missing or do not fit, and what cannot be done.
    """
    require_own(model, "shrink")
    given = as_list(method)
    if not given:
        raise InputError("shrink: expected a method such as 'magnitude', got none")
    if options and len(given) > 1:
        raise InputError(f"shrink: options {', '.join(options)} are of which method? write them as 'NAME:option=value'")
    methods = [read_method(each, "shrink", **options) for each in given]
    tasks = tasks_of(data, model)
    training = heal_spec(heal) if heal else None
    if training is not None and not tasks:
        raise InputError("heal: on what? give data, a task or text (--data TASK or FILE)")
    read = calibration_of(data, tasks, model, prompts, seed)
    _check(methods, model, read, training, transformers)
    losses = {} if read is None else {"before": read.loss(model)}
    generator = torch.Generator().manual_seed(seed)
    made, steps = model, []
    for each in methods:
        began, before = time.perf_counter(), made.weight_nbytes
        converted = each(made, read, generator)
        made = converted.model
        seconds = time.perf_counter() - began
        steps.append(Step(each.name, each.options, converted.lines, before, made.weight_nbytes, seconds))
    if read is not None:
        losses["converted"] = read.loss(made)
    healed = None
    if training is not None:
        sparse = any(each.family == "sparse" for each in methods)
        began, before, lora = time.perf_counter(), made.weight_nbytes, training.lora
        training, lines = put_beside(made, training, seed)
        if lora is not None and lines:
            own = lora.model_dump(include={"rank", "alpha"}, exclude_none=True)
            steps.append(Step("lora", own, lines, before, made.weight_nbytes, time.perf_counter() - began))
        result = heal_model(made, tasks, training, keep_zeros=sparse, seed=seed, progress=progress)
        last = float(result.history["loss"].iloc[-1]) if len(result.history) else float("nan")
        healed = Healed(result.step, result.seconds, last, result.status)
        assert read is not None
        losses["healed"] = read.loss(made)
    compared = [compare(model, made, task, prompts, seed) for task in tasks]
    return Shrunk(
        made, steps, losses, "" if read is None else read.name, healed, compared, state_bytes(model, made, LENGTHS)
    )


def state_bytes(before: Model, after: Model, lengths: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Tokens -> bytes of a sequence's state in both models; nothing of models that read whole sequences only."""
    if before.spec.reads_whole or after.spec.reads_whole:
        return {}
    return {length: (before.state_nbytes(length), after.state_nbytes(length)) for length in lengths}


def _check(
    methods: Sequence[Conversion],
    model: Model,
    data: Calibration | None,
    training: TrainSpec | None,
    transformers: bool,
) -> None:
    """Refuse at once what a later method would refuse after the work of those before it."""
    spec = planned(methods, model.spec, data is not None, training is not None)
    if training is not None:
        check_healing(spec, training, any(each.family == "sparse" for each in methods))
    if transformers:
        check_writable(spec)
    if data is not None:
        data.check(model)


def planned(methods: Sequence[Conversion], spec: ModelSpec, calibrated: bool, healed: bool = False) -> ModelSpec:
    """The spec of what comes out of methods in a row.

    calibrated: whether there are data. healed: whether it is trained afterwards.

    Raises InputError on methods that make nothing smaller, that need data or training where there is none, or that do
    not fit.
    """
    check_needs(methods, calibrated, healed)
    for each in methods:
        try:
            spec = each.plan(spec)
        except InputError as error:
            told = str(error)
            raise InputError(told if told.startswith(each.name) else f"{each.name}: {told}") from None
    return spec


def check_needs(methods: Sequence[Conversion], calibrated: bool, healed: bool = False) -> None:
    """Refuse methods that need what is not given, whatever the model; see `planned`. Raises InputError."""
    for each in methods:
        if "models" in each.needs or each.family == "growth":
            raise InputError(f"{each.name}: makes no model smaller; use `contextlab merge`, `convert.merge`")
        if "calibration" in each.needs and not calibrated:
            raise InputError(f"{each.name}: needs data to calibrate on; give a task or text (--data TASK or FILE)")
        if "training" in each.needs and not healed:
            raise InputError(
                f"{each.name}: what it makes must be trained; use `contextlab convert --to {each.name}`, where it "
                "learns from the old model, or shrink with --heal STEPS"
            )
