"""`convert`: a model to other mixers, trained from its teacher, and what was kept, lost, spent and saved."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from contextlab import registry
from contextlab.convert.base import Change, Conversion, Converted
from contextlab.convert.calibration import Calibration
from contextlab.convert.divergence import Compared, compare
from contextlab.convert.linearize.base import DISTIL
from contextlab.convert.linearize.plain import Linearize
from contextlab.convert.methods import as_list, read_data
from contextlab.convert.mixing import rebuilt
from contextlab.convert.transfer import Stage, StageResult, share_out, transfer
from contextlab.errors import InputError, unknown
from contextlab.files import atomic_folder, write_record
from contextlab.models import Model, ModelSpec, save_model
from contextlab.models.io import require_own
from contextlab.policies.core.parse import parse_options
from contextlab.progress import Steps as Progress
from contextlab.prompt import Task

RECORD = "convert.json"
BUDGET = 600
"""Steps where a conversion needs training and none are given."""
FAMILIES = ("linearize", "kv")
LENGTHS = (1024, 16384)


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

    def save(self, folder: str | Path, **more: Any) -> Path:
        """Write the model and the record into a folder that is not there yet. more: further keys of the record."""
        path = Path(folder)
        with atomic_folder(path) as temporary:
            save_model(self.model, temporary)
            write_record(temporary / RECORD, {**more, **self.record()})
        return path


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
    tasks = [read_data(each, model) for each in as_list(data)]
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
    device = next(model.parameters()).device
    calibration = Calibration.of_task(tasks, prompts, seed=seed, device=device) if tasks else None
    if calibration is not None:
        calibration.check(model)
    converted = method(model, calibration, torch.Generator().manual_seed(seed))
    changed = differing(model.spec, converted.model.spec)
    _check_stages(converted.model.spec, learned, changed)
    counts = {
        "budget": steps,
        "stages": learned,
        "train_spec": train,
        "folder": folder,
        "progress": progress,
        "seed": seed,
    }
    choices: list[Choice] = []
    results: list[StageResult] = []
    if auto is not None:
        converted, choices, results, counts = _choose(model, method, converted, tasks, auto, prompts, counts)
        changed = differing(model.spec, converted.model.spec)
    if counts["budget"]:
        results += _train(model, converted.model, tasks, changed, counts)
    return Transferred(
        converted.model, method.name, _told(method), changed, converted.lines, results,
        [compare(model, converted.model, task, prompts, seed) for task in tasks], choices,
        {length: (model.state_nbytes(length), converted.model.state_nbytes(length)) for length in lengths},
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


def _train(
    teacher: Model, student: Model, tasks: Sequence[Task], changed: Sequence[int], counts: Mapping[str, Any]
) -> list[StageResult]:
    where = counts["folder"]
    return transfer(
        teacher, student, tasks, counts["stages"], layers=changed, budget=counts["budget"],
        train_spec=counts["train_spec"], seed=counts["seed"], folder=None if where is None else Path(where),
        resume=where is not None, progress=counts["progress"],
    )  # fmt: skip


def _choose(
    teacher: Model,
    method: Conversion,
    converted: Converted,
    tasks: Sequence[Task],
    count: int,
    prompts: int,
    counts: dict[str, Any],
) -> tuple[Converted, list[Choice], list[StageResult], dict[str, Any]]:
    """Keep the mixers of the `count` layers that, replaced alone, take the model least far from its teacher.

    Where the first stage is attention transfer, all candidates learn first, together; the stage is then done.
    Returns also what is left of the training.
    """
    student = converted.model
    changed = differing(teacher.spec, student.spec)
    results: list[StageResult] = []
    stages = counts["stages"]
    if counts["budget"] and stages and stages[0].distil.attention:
        steps = share_out(counts["budget"], stages, len(tasks))[0]
        where = None if counts["folder"] is None else Path(counts["folder"]) / "candidates"
        first = {**counts, "stages": stages[:1], "budget": steps, "folder": where}
        results = _train(teacher, student, tasks, changed, first)
        counts = {**counts, "stages": stages[1:], "budget": counts["budget"] - steps if stages[1:] else 0}
    mixers = {i: student.blocks[i].mixer for i in changed}
    far = {}
    for i in changed:
        for j in changed:
            student.blocks[j].mixer = mixers[j] if j == i else teacher.blocks[j].mixer
        each = [compare(teacher, student, task, prompts, counts["seed"] + 1).divergence for task in tasks]
        far[i] = sum(each) / len(each)
    chosen = sorted(sorted(changed, key=far.__getitem__)[:count])
    plan = dataclasses.replace(method, layers=chosen).plan(teacher.spec)  # type: ignore[call-arg]
    for i in changed:
        student.blocks[i].mixer = mixers[i]
    final = rebuilt(teacher, plan, chosen, torch.Generator().manual_seed(0))
    for i in chosen:
        final.blocks[i].mixer.load_state_dict(mixers[i].state_dict())  # type: ignore[union-attr]
    lines = [line for i, line in zip(changed, converted.lines, strict=True) if i in chosen]
    choices = [Choice(i, far[i], i in chosen) for i in changed]
    return Converted(final, lines), choices, results, counts
