"""Recipes in stages: experiments one after another, whose models may start from those of the stages before.

Each stage is a run of its own, in a folder of its name within that of the whole, which holds the recipe as stages.yaml.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from contextlab.errors import InputError, unknown
from contextlab.experiments.distill import DistillSpec
from contextlab.experiments.entries import Name
from contextlab.experiments.folder import RunFolder, spec_text
from contextlab.experiments.recipes import find_recipe, read_yaml, set_key
from contextlab.experiments.spec import ExperimentSpec
from contextlab.experiments.starts import planned
from contextlab.files import write_atomic
from contextlab.spec import Spec, describe

FILE = "stages.yaml"
"""In the folder of the whole: the recipe."""
MERGED = ("train", "evaluate")
"""Keys that a stage changes key by key; of others it has its own or those of all."""


class StagesSpec(Spec):
    """What of a recipe says that it has stages.

    name: of the whole; a stage's run is called "NAME-STAGE".
    stages: name -> keys of an ExperimentSpec. What stands beside `stages` holds for all that do not say otherwise.
    """

    name: Name
    stages: dict[Name, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _some(self) -> StagesSpec:
        if not self.stages:
            raise InputError("stages: expected at least one stage, a name with keys such as models and train")
        return self


@dataclass(frozen=True)
class Stage:
    """One stage, when it is its turn. spec, folder: of its run. begun: whether that is there to be gone on with."""

    name: str
    spec: ExperimentSpec
    folder: Path
    begun: bool


class Stages:
    """A recipe in stages.

    data: its plain data, as YAML gives it. Raises InputError where it has no such form.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = dict(data)
        described = StagesSpec.parse({key: data[key] for key in ("name", "stages") if key in data})
        self.name, self.stages = described.name, described.stages
        self.common = {key: value for key, value in data.items() if key not in ("name", "stages")}

    def each(self, do: Callable[[str, ExperimentSpec], object]) -> None:
        """Call `do` with each stage's name and spec, before any is trained: models start from specs of those before.

        Raises InputError that names the stage.
        """
        known: dict[str, ExperimentSpec] = {}
        for name in self.stages:
            found = {f"{stage}:{model}": spec for stage, spec in known.items() for model in _models(spec)}
            with _of_stage(name), planned(found):
                spec = ExperimentSpec.parse(self._data(name, known))
                do(name, spec)
            known[name] = spec

    def turns(self, out: Path) -> Iterator[Stage]:
        """Each stage, in order; one must have been run before the next one is asked for. out: folder of the whole."""
        known: dict[str, Any] = {}
        for name in self.stages:
            with _of_stage(name):
                spec = ExperimentSpec.parse(self._data(name, known, out))
            folder = RunFolder(out / name)
            begun = folder.spec.exists()
            if begun:
                _follow(folder, spec)
            yield Stage(name, spec, folder.path, begun)
            known[name] = spec

    def _data(self, name: str, before: Mapping[str, Any], out: Path | None = None) -> dict[str, Any]:
        """Plain data of a stage's ExperimentSpec. before: the stages before it. out: where their runs lie."""
        own = self.stages[name]
        if "stages" in own or "name" in own:
            raise InputError(f"{'stages' if 'stages' in own else 'name'}: a stage has none; leave it out")
        data = {**self.common, **own, "name": f"{self.name}-{name}"}
        for key in MERGED:
            parts = [each[key] for each in (self.common, own) if key in each]
            if all(isinstance(part, Mapping) for part in parts) and parts:
                data[key] = {key: value for part in parts for key, value in part.items()}
        if isinstance(data.get("distill"), Mapping):
            data["distill"] = self._in_run(data["distill"], "teacher", "distill.teacher", name, before, out)
        models = data.get("models")
        if not isinstance(models, Mapping):
            return data
        data["models"] = {model: self._placed(entry, name, before, out) for model, entry in models.items()}
        return data

    def _placed(self, entry: Any, name: str, before: Mapping[str, Any], out: Path | None) -> Any:
        """A model's entry, with the folder of the run where it starts, or learns, from a model of a stage."""
        if not isinstance(entry, Mapping):
            return entry
        placed = self._in_run(entry, "from", "from", name, before, out)
        if isinstance(placed.get("distill"), Mapping):
            taught = self._in_run(placed["distill"], "teacher", "distill.teacher", name, before, out)
            placed = {**placed, "distill": taught}
        return placed

    def _in_run(
        self, data: Mapping[str, Any], key: str, where: str, name: str, before: Mapping[str, Any], out: Path | None
    ) -> Mapping[str, Any]:
        """The data with the folder of the run in the place of STAGE:MODEL under a key. where: the key in messages."""
        source = data.get(key)
        stage, colon, model = source.partition(":") if isinstance(source, str) else ("", "", "")
        if not colon or stage not in self.stages:
            return data
        if stage not in before:
            raise InputError(f"{where}: {stage} is no stage before {name} (those are: {', '.join(before) or 'none'})")
        if model not in (known := _models(before[stage])):
            raise InputError(f"{where}: {unknown(f'model of stage {stage}', model, known)}")
        return data if out is None else {**data, key: f"{out / stage}:{model}"}


def _follow(folder: RunFolder, spec: ExperimentSpec) -> None:
    """Where the whole has been moved since a stage was begun, let its recipe say where the stages before lie now."""
    before = read_yaml(folder.spec)
    models = before.get("models")
    for name, entry in models.items() if isinstance(models, dict) else ():
        if name not in spec.models or not isinstance(entry, dict):
            continue
        own = spec.models[name]
        if own.source is not None and isinstance(entry.get("from"), str):
            entry["from"] = own.source
        _follow_teacher(entry, own.distill)
    _follow_teacher(before, spec.distill)
    if ExperimentSpec.parse(before) == spec:
        write_atomic(folder.spec, spec_text(spec))


def _follow_teacher(data: Any, now: DistillSpec | None) -> None:
    told = data.get("distill")
    if now is not None and now.teacher is not None and isinstance(told, dict) and isinstance(told.get("teacher"), str):
        told["teacher"] = now.teacher


def _models(spec: ExperimentSpec) -> list[str]:
    return list(dict.fromkeys(job.model for job in spec.measured()))


@contextmanager
def _of_stage(name: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"stages.{name}: {error}") from None


def load_stages(recipe: str | Path | Mapping[str, Any], changes: Sequence[str] = ()) -> Stages | None:
    """A recipe in stages, by its file, the folder of its run or its plain data; None for one that has no stages.

    changes: `path.to.key=value`, such as "stages.adapt.train.steps=100".

    Raises InputError.
    """
    if isinstance(recipe, str | Path):
        path = Path(recipe)
        if path.is_dir():
            if not (path / FILE).exists():
                return None
            path = path / FILE
        data = read_yaml(find_recipe(path))
    else:
        data = dict(recipe)
    if "stages" not in data:
        return None
    for change in changes:
        set_key(data, change)
    if not isinstance(data["stages"], Mapping):
        raise InputError(f"stages: expected a mapping from names to stages, got {describe(data['stages'])}")
    return Stages(data)


def claim(stages: Stages, out: str | Path | None, resume: bool) -> Path:
    """The folder of the whole, with the recipe in it.

    out: None takes runs/<name>, or runs/<name>-2 and so on; to resume, the last of them.

    Raises InputError where the folder is taken, or holds another recipe.
    """
    if out is None:
        base = Path("runs") / stages.name
        numbered = itertools.chain([base], (Path(f"{base}-{number}") for number in itertools.count(2)))
        if resume:
            begun = [each for each in itertools.takewhile(Path.exists, numbered) if (each / FILE).exists()]
            if not begun:
                raise InputError(f"{base}: there is no run in stages to resume; start one without --resume")
            folder = begun[-1]
        else:
            folder = next(each for each in numbered if not each.exists())
    else:
        folder = Path(out)
    file = folder / FILE
    if file.exists():
        if not resume:
            raise InputError(
                f"{folder}: holds a run in stages; go on with --resume, or choose another folder with --out"
            )
        if read_yaml(file) != stages.data:
            raise InputError(
                f"{folder}: the run there was started with another recipe (see {file}); resume it with: contextlab run "
                f"{folder} --resume"
            )
        return folder
    if resume:
        raise InputError(f"{folder}: there is no run in stages to resume; start one without --resume")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is taken; choose an empty or new folder with --out")
    write_atomic(file, yaml.safe_dump(stages.data, sort_keys=False))
    return folder
