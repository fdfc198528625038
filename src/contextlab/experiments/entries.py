"""What the tasks and models of an experiment are, as data."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, NonNegativeInt, model_validator

from contextlab import registry
from contextlab.errors import InputError
from contextlab.experiments.distill import DistillSpec
from contextlab.models import ModelSpec
from contextlab.models.changes import ReplaceSpec
from contextlab.models.start_plan import Init
from contextlab.spec import Spec

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_+-]*$", max_length=60)]


class TaskEntry(Spec):
    """A task of an experiment.

    task: registered name.
    preset: one of the task's named difficulties.
    options: the task's options, which may change the preset's.
    model: changes for this task to every model that has such an option, for example `{depth: 2}`.
    train: changes to the experiment's `train` for this task.
    evaluate: changes to the experiment's `evaluate` for this task.
    """

    task: str
    preset: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    evaluate: dict[str, Any] = Field(default_factory=dict)


class MultiTaskEntry(Spec):
    """A training of one model on several of the experiment's tasks, which take turns (2404.03558).

    The tasks' own changes to models and training do not count here, those of `evaluate` do.

    tasks: their names, in the order of the curriculum.
    model: changes to every model that has such an option.
    train: changes to the experiment's `train`; `order` says how the tasks take turns.
    """

    tasks: tuple[Name, ...]
    model: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _several(self) -> MultiTaskEntry:
        if len(set(self.tasks)) < max(2, len(self.tasks)):
            raise InputError(f"tasks: expected two or more different tasks, got {list(self.tasks)}")
        return self


class ModelEntry(Spec):
    """A model of an experiment: a preset with options, a whole ModelSpec, or a trained model to start from.

    preset: registered name of a preset.
    options: the preset's options, or keys of ModelSpec that replace what the preset, or the trained model, has.
    spec: a ModelSpec, in place of a preset.
    from: a trained model, in place of a preset: RUN:MODEL (of several seeds or tasks the training of the same seed or
        task), RUN where it has one, the folder of a training, a checkpoint or a saved model, a transformers folder or
        the name of one on the hub. What fits by names and shapes is carried over.
    replace: of a model that starts from another, other mixers in some blocks: one ReplaceSpec or a list.
    remove: numbers of blocks of the trained model that are left out.
    convert: of a model that starts from another, a conversion or a mixer by name, with options, such as
        "gqa:kv_heads=1" or "gated_delta_net:layers=half": what `contextlab convert --to` takes; it trains nothing.
    init: what new parts start from, "fresh", "copied", "zero" or "averaged"; see `models.start.start_model`. None is
        "fresh".
    distill: the teacher that it learns from, in the place of the experiment's `distill`.
    train: changes to the task's training for this model; `steps: 0` leaves a model that starts from another, or whose
        weights are written down, as it is.
    sweep: changes to the experiment's `sweep` for this model; fields of `over` are added, and null takes one away.
    """

    preset: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    spec: dict[str, Any] | None = None
    source: Annotated[str, Field(min_length=1)] | None = Field(default=None, alias="from")
    replace: ReplaceSpec | tuple[ReplaceSpec, ...] | None = None
    remove: tuple[NonNegativeInt, ...] = ()
    convert: Annotated[str, Field(min_length=1)] | None = None
    init: Init | None = None
    distill: DistillSpec | None = None
    train: dict[str, Any] = Field(default_factory=dict)
    sweep: dict[str, Any] = Field(default_factory=dict)

    model_config = ConfigDict(serialize_by_alias=True)

    @model_validator(mode="after")
    def _one_source(self) -> ModelEntry:
        if sum(each is not None for each in (self.preset, self.spec, self.source)) != 1:
            raise InputError(
                "give either preset (a registered model's name), spec (a ModelSpec) or from (a trained model), one of "
                "them"
            )
        if self.source is None:
            for name in ("replace", "remove", "init", "convert"):
                if getattr(self, name):
                    raise InputError(
                        f"{name}: is for a model that starts from a trained one; give from, or leave it out"
                    )
        for name in ("replace", "remove", "init"):
            if self.convert is not None and getattr(self, name):
                raise InputError(f"convert and {name}: the conversion says what each part starts from; give one")
        return self

    @property
    def replacements(self) -> tuple[ReplaceSpec, ...]:
        """What `replace` lists."""
        if self.replace is None:
            return ()
        return (self.replace,) if isinstance(self.replace, ReplaceSpec) else self.replace

    @property
    def has_weights(self) -> bool:
        """Whether it has weights that mean something before it is trained: another's, or a construction's."""
        if self.source is not None or (self.spec or {}).get("construction") is not None:
            return True
        if self.preset not in registry.names("model") or self.options.get("construction", self) is None:
            return False
        return hasattr(registry.lookup("model", str(self.preset)).factory, "construction")

    def knows(self, option: str) -> bool:
        """Whether `option` is a key of ModelSpec or an option of the preset."""
        if option in ModelSpec.model_fields or self.preset not in registry.names("model"):
            return option in ModelSpec.model_fields
        return any(p.name == option for p in registry.lookup("model", self.preset).parameters)

    @property
    def option_names(self) -> list[str]:
        """All options that it knows."""
        own = self.preset in registry.names("model") and registry.lookup("model", str(self.preset)).parameters
        return [*(p.name for p in own or ()), *ModelSpec.model_fields]
