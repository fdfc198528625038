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
from contextlab.convert.base import Change, Conversion, Converted, set_apart
from contextlab.convert.divergence import Compared, compare
from contextlab.convert.linearize.base import DISTIL
from contextlab.convert.linearize.plain import Linearize
from contextlab.convert.methods import calibration_of, tasks_of
from contextlab.convert.mixing import rebuilt
from contextlab.convert.saving import Origin, save_converted
from contextlab.convert.shrink import LENGTHS, state_bytes
from contextlab.convert.transfer import Stage, StageResult, share_out, transfer
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


@dataclass(frozen=True)
class Choice:
    """A layer that might have become another mixer, and how far the model is from its teacher where it alone does.

    divergence: see `Compared.divergence`, averaged over the tasks. chosen: whether it is one of the least.
    """

    layer: int
    divergence: float
    chosen: bool


@dataclass(frozen=True)
class Transferred:
    """A converted model, and what was done, kept and spent.

    model: in evaluation mode. method, options: the conversion. layers: numbers of those that changed. lines: what was
        done to each, with its error before training. stages: the training. compared: teacher and student on each task.
        choices: of `layers="auto:N"`.
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
    progress: Progress | bool | None = False,
    **options: Any,
) -> Transferred:
    """Convert attention layers of a trained model to another mixer, or make their state smaller, and train what is new.

    model: a `Model`, the teacher; it is left as it is.
    to: a conversion of family "linearize" or "kv", its name, or a mixer's, with options: "hedgehog", "mla:rank=32",
        "gated_delta_net:short_conv=4".
    data: tasks, or files or folders of text, that the student is trained, calibrated and measured on.
    layers: "all", "half" (the last of each two stays), numbers; or "auto:N", the N whose change alone takes the model
        least far from its teacher, once their mixers have learned from the attention.
    budget: optimiser steps of all stages; None is 600 where the conversion needs training, else 0. 0 trains nothing.
    stages: what is learned, in the place of the conversion's own (`transfer.Stage`).
    train: keys of a TrainSpec that hold for every stage, such as batch, learning_rate and optimizer.
    prompts: of each task, on which output projections are fitted, and others on which the models are compared.
    lengths: tokens at which the bytes of state are told.
    seed: of what is drawn.
    folder: where the stages keep checkpoints; the same call then goes on after an interruption, bit for bit: a stage
        that ended is read, one that was cut short goes on from its last checkpoint.
    progress: of the training, as `train` takes it.
    options: of the conversion, where it is given by name.

    Raises InputError on targets that cannot take the weights, layers that cannot change or do not exist, a budget too
    small for the stages, data of another vocabulary or none where they are needed.
    """
    require_own(model, "convert")
    began = time.perf_counter()
    auto = _auto(layers)
    method = read_target(to, None if auto else layers, options)
    if auto is not None:
        method = dataclasses.replace(method, layers="all")  # type: ignore[call-arg]
    if budget is not None and budget < 0:
        raise InputError(f"budget: expected steps, at least 0, got {budget}")
    tasks = tasks_of(data, model)
    learned = tuple(getattr(method, "stages", ()) if stages is None else stages)
    trains = "training" in method.needs
    steps = (BUDGET if trains else 0) if budget is None else budget
    if steps and not tasks:
        raise InputError(
            f"{method.name}: trains for {steps} steps, on what? give data (--data TASK or FILE), or budget 0"
        )
    if steps and not learned:
        learned = (DISTIL,)
    planned = method.plan(model.spec)
    if auto is not None:
        _check_auto(method, auto, differing(model.spec, planned), tasks)
    calibration = calibration_of(None, tasks, model, prompts, seed)
    if calibration is not None:
        calibration.check(model)
    converted = method(model, calibration, torch.Generator().manual_seed(seed))
    changed = differing(model.spec, converted.model.spec)
    _check_stages(converted.model.spec, learned, changed)
    training = _Training(steps, learned, train, None if folder is None else Path(folder), progress, seed)
    choices: list[Choice] = []
    results: list[StageResult] = []
    if auto is not None:
        converted, choices, results, training = _choose(model, method, converted, tasks, auto, prompts, training)
        changed = differing(model.spec, converted.model.spec)
    if training.budget:
        results += training.run(model, converted.model, tasks, changed)
    return Transferred(
        converted.model, method.name, _told(method), changed, converted.lines, results,
        [compare(model, converted.model, task, prompts, seed) for task in tasks], choices,
        state_bytes(model, converted.model, lengths),
        (model.weight_nbytes, converted.model.weight_nbytes), time.perf_counter() - began,
    )  # fmt: skip


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
    raise InputError(unknown("conversion or mixer", name, [*known, *registry.names("mixer")]))


def _told(method: Conversion) -> dict[str, Any]:
    """Its options that are not their defaults; of `Linearize` also the mixer, which is most of what it is."""
    return {**({"mixer": method.mixer} if isinstance(method, Linearize) else {}), **method.options}


def differing(before: ModelSpec, after: ModelSpec) -> list[int]:
    """The layers that two specs of one depth describe differently."""
    pairs = zip(before.pattern(), after.pattern(), strict=True)
    return [i for i, (one, other) in enumerate(pairs) if one != other]


def _auto(layers: Any) -> int | None:
    """N of "auto:N"; None of other layers."""
    if not isinstance(layers, str) or not layers.startswith("auto"):
        return None
    count = layers.removeprefix("auto").removeprefix(":")
    if not (count.isascii() and count.isdigit()) or int(count) < 1:
        raise InputError(f"layers: expected auto:N, for example auto:2, got {layers[:40]!r}")
    return int(count)


def _check_auto(method: Conversion, count: int, candidates: Sequence[int], tasks: Sequence[Task]) -> None:
    if not tasks:
        raise InputError("layers auto: are chosen by what the model answers; give data (--data TASK or FILE)")
    if count > len(candidates):
        raise InputError(f"layers: auto:{count} is more than the {len(candidates)} that can change; use all")
    if not getattr(method, "apart", True):
        raise InputError(
            f"{method.name}: its layers change together, so that none can be tried alone; give their numbers"
        )


def _check_stages(spec: ModelSpec, stages: Sequence[Stage], changed: Sequence[int]) -> None:
    shared = [i for i in changed if spec.pattern()[i].kv == "shared"]
    if shared and any(stage.distil.attention for stage in stages):
        raise InputError(
            f"stages: layer {shared[0]} reads another's keys, so that it cannot learn attention alone; use logits"
        )


@dataclass(frozen=True)
class _Training:
    """How a conversion is trained: see `convert`."""

    budget: int
    stages: tuple[Stage, ...]
    settings: Mapping[str, Any] | None
    folder: Path | None
    progress: Progress | bool | None
    seed: int

    def run(self, teacher: Model, student: Model, tasks: Sequence[Task], changed: Sequence[int]) -> list[StageResult]:
        """Train the layers that changed, in place."""
        return transfer(
            teacher, student, tasks, self.stages, layers=changed, budget=self.budget, train_spec=self.settings,
            seed=self.seed, folder=self.folder, resume=self.folder is not None, progress=self.progress,
        )  # fmt: skip


def _choose(
    teacher: Model,
    method: Conversion,
    converted: Converted,
    tasks: Sequence[Task],
    count: int,
    prompts: int,
    training: _Training,
) -> tuple[Converted, list[Choice], list[StageResult], _Training]:
    """Keep the mixers of the `count` layers that, replaced alone, take the model least far from its teacher.

    Where the first stage is attention transfer, all candidates learn first, together; the stage is then done.
    Returns also what is left of the training.
    """
    student = converted.model
    changed = differing(teacher.spec, student.spec)
    results: list[StageResult] = []
    first, *rest = training.stages or (None,)
    if training.budget and first is not None and first.distil.attention:
        steps = share_out(training.budget, training.stages, len(tasks))[0]
        where = None if training.folder is None else training.folder / "candidates"
        begun = dataclasses.replace(training, stages=(first,), budget=steps, folder=where)
        results = begun.run(teacher, student, tasks, changed)
        training = dataclasses.replace(training, stages=tuple(rest), budget=training.budget - steps if rest else 0)
    mixers = {i: student.blocks[i].mixer for i in changed}
    far = {}
    for i in changed:
        for j in changed:
            student.blocks[j].mixer = mixers[j] if j == i else teacher.blocks[j].mixer
        each = [compare(teacher, student, task, prompts, training.seed + 1).divergence for task in tasks]
        far[i] = sum(each) / len(each)
    chosen = sorted(sorted(changed, key=far.__getitem__)[:count])
    plan = dataclasses.replace(method, layers=chosen).plan(teacher.spec)  # type: ignore[call-arg]
    for i in changed:
        student.blocks[i].mixer = mixers[i]
    final = rebuilt(teacher, plan, chosen, torch.Generator().manual_seed(0))
    for i in chosen:
        final.blocks[i].mixer.load_state_dict(mixers[i].state_dict())  # type: ignore[union-attr]
    set_apart(final, teacher)
    lines = [line for i, line in zip(changed, converted.lines, strict=True) if i in chosen]
    choices = [Choice(i, far[i], i in chosen) for i in changed]
    return Converted(final, lines), choices, results, training
