"""Models that start from a trained one: where that lies, what it is, and what of it is taken over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contextlab.errors import InputError, unknown
from contextlab.experiments.converting import conversion_plan, converted_model, converted_spec, told
from contextlab.files import file_digest, read_record
from contextlab.models import ModelSpec, build_model, load
from contextlab.models.changes import changed_blocks
from contextlab.models.hub import downloaded, native_spec_of
from contextlab.models.io import SPEC, WEIGHTS, read_description, weights_digest
from contextlab.models.stack import Model
from contextlab.models.start import plan_start, start_model
from contextlab.models.start_plan import Init, Plan
from contextlab.prompt import Task
from contextlab.training import checkpoint

if TYPE_CHECKING:
    from contextlab.experiments.entries import ModelEntry
    from contextlab.experiments.jobs import Training
    from contextlab.experiments.spec import ExperimentSpec

OF_TRAINING: Mapping[str, type] = {"task": str, "model": str, "seed": int}
"""What the record of a training must tell to be found by it."""


@dataclass(frozen=True)
class Source:
    """A trained model that others start from.

    text: as a recipe has it. folder: where it lies. ours: whether it is a saved model of ours, or one of transformers'.
    digest: SHA-256 of its weights. spec: of the model.
    """

    text: str
    folder: Path
    ours: bool
    digest: str
    spec: ModelSpec

    def load(self) -> Model:
        """The model, in float32. Raises InputError where its files are damaged, or have changed by now."""
        if self.ours:
            known = weights_digest(self.folder)
        else:
            known = _digest_of_files(self.folder)
        if known != self.digest:
            raise InputError(f"{self.text}: has changed since this run looked at it; begin another run")
        model = load(self.folder, native=True)
        assert isinstance(model, Model)
        return model.float()


@dataclass(frozen=True)
class Start:
    """What a training starts from.

    source: the trained model. blocks: for each block of the new model the source's that it was, None for an added one.
    init: what the rest starts from. convert: the conversion that makes the model, in the place of both.
    """

    source: Source
    blocks: tuple[int | None, ...]
    init: Init
    convert: str | None = None

    def plan(self, spec: ModelSpec) -> Plan:
        """What becomes of the tensors, no weights read. Raises InputError where it is impossible."""
        if self.convert is not None:
            return conversion_plan(self.convert, spec, self.source.spec)
        return plan_start(spec, self.source.spec, self.init, blocks=self.blocks)

    def record(self, plan: Plan, done: Sequence[str] = ()) -> dict[str, Any]:
        """What records tell of it. done: by the conversion, a line for each layer."""
        before = way_of(self.source.folder)
        return {
            "from": self.source.text,
            "folder": str(self.source.folder),
            "weights_sha256": self.source.digest,
            **({"init": self.init} if self.convert is None else {"convert": self.convert}),
            "told": [*plan.lines(), *done],
            **({"before": before} if before else {}),
        }


def new_model(training: Training) -> tuple[Model, dict[str, Any]]:
    """The model that a training begins with, on the CPU, and what its record tells of its start; {} of a fresh one."""
    start = training.start
    if start is None:
        return build_model(training.model, seed=training.seed), {}
    if start.convert is not None:
        source, tasks = start.source.load(), list(training.tasks.values())
        model, changes = converted_model(start.convert, source, training.model, tasks, training.seed)
        return model, {"start": start.record(start.plan(training.model), told(changes))}
    made = start_model(training.model, start.source.load(), start.init, blocks=start.blocks, seed=training.seed)
    return made.model, {"start": start.record(made.plan)}


def changed_spec(entry: ModelEntry, source: Source, options: Mapping[str, Any]) -> ModelSpec:
    """The spec of a model of a recipe that starts from `source`. options: keys of ModelSpec. Raises InputError."""
    stray = [key for key in options if key not in ModelSpec.model_fields]
    if stray:
        raise InputError(f"options.{stray[0]}: {unknown('key of ModelSpec', stray[0], ModelSpec.model_fields)}")
    if "layers" in options and (entry.replacements or entry.remove):
        raise InputError("options.layers and replace, remove: one would undo the other; give one of them")
    if entry.convert is not None:
        spec = converted_spec(entry.convert, source.spec)
        made = ModelSpec.parse({**spec.model_dump(), **options})
        if made != spec:
            other = next(key for key in options if getattr(made, key) != getattr(spec, key))
            raise InputError(f"options.{other}: convert changes the trained model as it is; leave {other} out")
        return made
    spec, _ = changed_blocks(source.spec, entry.replacements, entry.remove)
    if "heads" in entry.options and "layers" not in options and all("heads" in each.options for each in spec.layers):
        heads = ", ".join(str(count) for count in dict.fromkeys(each.options["heads"] for each in spec.layers))
        raise InputError(
            f"options.heads: the layers of {source.text} say it themselves ({heads}); give replace: {{options: "
            f"{{heads: {entry.options['heads']}}}}}"
        )
    return ModelSpec.parse({**spec.model_dump(), **options})


def require_task(spec: ModelSpec, source: Source, task: Task) -> None:
    """Refuse a task whose prompts the trained model cannot read. Raises InputError."""
    for name in ("read_in", "input_size", "output_size"):
        has, needs = getattr(spec, name), getattr(task, name)
        if has is not None and has != needs:
            instead = f"{name}: null" if name != "read_in" else f"read_in: {needs}, input_size: null"
            raise InputError(
                f"from: {source.text} has {name} {has!r}, but the task needs {needs!r}; take another of the two, or "
                f"give options: {{{instead}}}, which makes that part new"
            )


def source_of(spec: ExperimentSpec, name: str, task: str, seed: int | None = None) -> Source | None:
    """The trained model that a model of a recipe starts from; None where it begins fresh.

    name: of the model. task, seed: of its training; None: the first seed.
    """
    text = spec.models[name].source
    return None if text is None else find_source(text, task, spec.seeds[0] if seed is None else seed)


def start_of(spec: ExperimentSpec, name: str, task: str, seed: int, model: ModelSpec) -> Start | None:
    """What a training starts from; None where it begins fresh.

    name: of its model in the recipe. model: its spec. Raises InputError where the seeds' sources are not alike.
    """
    source, own = source_of(spec, name, task), source_of(spec, name, task, seed)
    if source is None or own is None:
        return None
    if own.spec != source.spec:
        raise InputError(
            f"models.{name}.from: {own.folder} is of another spec than {source.folder}; expected one for all seeds"
        )
    entry = spec.models[name]
    _, kept = changed_blocks(source.spec, entry.replacements, entry.remove)
    blocks = [*kept, *[None] * (model.depth - len(kept))][: model.depth]
    return Start(own, tuple(blocks), entry.init or "fresh", entry.convert)


# ---- where sources lie ----


def of_run(source: str | Path, task: str | None = None, seed: int | None = None) -> Path | None:
    """The folder of the training that RUN:MODEL means; None for a text that is not of this form.

    task, seed: which of the model's trainings is meant where it was trained on several tasks, or from several seeds.

    Raises InputError where the run has no such model, or where it is not known which training is meant.
    """
    text = str(source)
    run, colon, model = text.rpartition(":")
    trainings = Path(run) / "trainings"
    if not colon or not run or Path(text).exists() or not trainings.is_dir():
        return None
    records = {path.parent: read_record(path, OF_TRAINING) for path in sorted(trainings.glob("*/record.json"))}
    found = {folder: record for folder, record in records.items() if record["model"] == model}
    if not found:
        raise InputError(f"{run}: {unknown('trained model', model, {each['model'] for each in records.values()})}")
    for key, wanted in (("task", task), ("seed", seed)):
        if any(record[key] == wanted for record in found.values()):
            found = {folder: record for folder, record in found.items() if record[key] == wanted}
    if len(found) > 1:
        shown = ", ".join(str(folder) for folder in list(found)[:8]) + (", ..." if len(found) > 8 else "")
        raise InputError(f"{text}: {model} was trained {len(found)} times there; give one of these folders: {shown}")
    return next(iter(found))


def only_training(run: Path) -> Path:
    """The folder of the only training of a run that has a checkpoint. Raises InputError where none or several have."""
    found = [each for each in sorted((run / "trainings").iterdir()) if checkpoint.newest(each) is not None]
    if not found:
        raise InputError(f"{run}: no training of this run has a checkpoint yet; go on with `contextlab run`")
    if len(found) > 1:
        models = {read_record(path, OF_TRAINING)["model"] for path in run.glob("trainings/*/record.json")}
        shown = ", ".join(str(each) for each in found[:8]) + (", ..." if len(found) > 8 else "")
        raise InputError(
            f"{run}: the run has {len(found)} trained models; give one of their folders: {shown}; or {run}:MODEL, of "
            f"which there are: {', '.join(sorted(models)) or 'none'}"
        )
    return found[0]


def find_source(text: str, task: str, seed: int) -> Source:
    """The trained model that a recipe names: RUN:MODEL, RUN, the folder of a training, of a checkpoint or of a saved
    model, a transformers folder or the name of one on the hub.

    task, seed: of the training that starts from it, by which one of several trainings of RUN:MODEL is chosen.

    Raises InputError where there is none, or where its training has not ended.
    """
    plan = _planned.get() or {}
    if text in plan:
        return _of_plan(text, plan[text], task, seed)
    folder = of_run(text, task, seed) or Path(text)
    if (folder / "trainings").is_dir():
        folder = only_training(folder)
    last = checkpoint.newest(folder) if folder.is_dir() else None
    if last is not None:
        status = read_record(last / checkpoint.RECORD, checkpoint.KEYS)["status"]
        if status != "finished":
            raise InputError(
                f"{text}: its training has not finished (step {checkpoint.step_of(last)}, {status or 'interrupted'}); "
                f"go on with it, or give a checkpoint's folder: {last}"
            )
        folder = last
    if (folder / SPEC).exists():
        return _ours(text, folder, (folder / SPEC).stat().st_mtime_ns)
    if (folder / "stages.yaml").exists():
        parts = ", ".join(str(each.parent) for each in sorted(folder.glob("*/trainings")))
        raise InputError(f"{text}: a run in stages; expected one of them ({parts}), or :MODEL after it")
    if not folder.exists():
        folder = downloaded(text)
    if not (folder / "config.json").exists():
        raise InputError(
            f"{text}: no trained model there; expected a run, RUN:MODEL, a training, a checkpoint ({SPEC}, {WEIGHTS}), "
            "or a transformers folder (config.json, *.safetensors)"
        )
    return Source(text, folder, False, _digest_of_files(folder), _native_spec(folder))


_planned: ContextVar[Mapping[str, ExperimentSpec] | None] = ContextVar("planned", default=None)


@contextmanager
def planned(found: Mapping[str, ExperimentSpec]) -> Iterator[None]:
    """Within, these texts mean models that are yet to be trained, of these experiments: their specs are known."""
    token = _planned.set(found)
    try:
        yield
    finally:
        _planned.reset(token)


def _of_plan(text: str, spec: ExperimentSpec, task: str, seed: int) -> Source:
    """What will be found there. Of a sweep's trials the first one stands for all."""
    found = [job for job in spec.measured() if job.model == text.partition(":")[2]]
    for key, wanted in (("task", task), ("seed", seed)):
        if any(getattr(job, key) == wanted for job in found):
            found = [job for job in found if getattr(job, key) == wanted]
    if len(found) > 1:
        raise InputError(
            f"{text}: {found[0].model} is trained {len(found)} times there ({', '.join(job.title for job in found[:4])}"
            f"{', ...' * (len(found) > 4)}), and none is of this task and seed; give the stages like tasks and seeds"
        )
    return Source(text, Path(text), True, "", spec.candidates(found[0])[0].model.made)


@lru_cache(maxsize=64)
def _ours(text: str, folder: Path, written: int) -> Source:
    """written: by which a file is told from the one that it replaced."""
    data, _ = read_description(folder)
    return Source(text, folder, True, weights_digest(folder), ModelSpec.parse(data, str(folder / SPEC)))


@lru_cache(maxsize=16)
def _native_spec(folder: Path) -> ModelSpec:
    return native_spec_of(folder)


def _digest_of_files(folder: Path) -> str:
    """One SHA-256 of a transformers folder's weights and configuration."""
    paths = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return _digest(tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths))


@lru_cache(maxsize=16)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    whole = hashlib.sha256()
    for path, _, _ in files:
        whole.update(f"{path.name} {file_digest(path)}\n".encode())
    return whole.hexdigest()


# ---- what records tell ----


def way_of(folder: Path) -> dict[str, Any]:
    """What the training of a run, of which this is a checkpoint, tells of its own start and teacher; {} of none."""
    path = folder.parent / "record.json"
    if not (checkpoint.is_checkpoint(folder) and path.exists()):
        return {}
    found = read_record(path, OF_TRAINING)
    return {key: found[key] for key in ("start", "distill") if isinstance(found.get(key), dict)}


def sources(trainings: Iterable[Training]) -> dict[str, dict[str, str]]:
    """What trainings start and learn from, as a run's record has it, by the key of the job that measures them.

    A teacher that is not what the training starts from stands under the key with " (teacher)" behind it.
    """
    found = {}
    for each in trainings:
        key, start, teaching = each.measured.key, each.start, each.teaching
        if start is not None:
            found[key] = _lies(start.source)
        if teaching is not None and (start is None or teaching.source != start.source):
            found[f"{key} (teacher)"] = {"does": "learns", **_lies(teaching.source)}
    return found


def _lies(source: Source) -> dict[str, str]:
    return {"from": source.text, "folder": str(source.folder), "weights_sha256": source.digest}


def require_same_sources(
    folder: object, known: Mapping[str, Mapping[str, str]] | None, now: Mapping[str, Mapping[str, str]]
) -> None:
    """Refuse to go on with a run where what its models start from has changed since it was begun.

    folder: of the run. known, now: `sources` of before and of now. Raises InputError.
    """
    for key, was in (known or {}).items():
        if key in now and now[key]["weights_sha256"] != was["weights_sha256"]:
            raise InputError(
                f"{folder}: {key} {now[key].get('does', 'starts')} from {now[key]['from']}, which has changed since "
                f"this run was begun (other weights in {now[key]['folder']}); put it back, or begin another run"
            )
