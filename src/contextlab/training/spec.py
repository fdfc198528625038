"""TrainSpec: how a model is trained, as data."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from contextlab.errors import InputError, unknown
from contextlab.spec import Spec
from contextlab.training.layer_skip import LayerSkipSpec

OPTIMIZERS = ("muon", "adamw")
"""Our own, beside which any class may be named."""
Order = Literal["sequential", "mixed", "random"]
ROUNDING = 1e-9
"""Of a share of steps: 0.1 x 30 is 3 steps, not the 4 that come of 3.0000000000000004."""


class CurriculumSpec(Spec):
    """One option of the task that grows while training (Garg et al., 2208.01066, appendix A.2).

    start: value at the first step.
    end: value at which it stops growing.
    add: what is added each time.
    every: steps between additions.
    """

    start: PositiveInt
    end: PositiveInt
    add: PositiveInt = 1
    every: PositiveInt = 2000

    @model_validator(mode="after")
    def _grows(self) -> CurriculumSpec:
        if self.end < self.start:
            raise InputError(f"end {self.end} is smaller than start {self.start}; a curriculum grows")
        return self

    def value(self, step: int) -> int:
        """The option's value at a step (counted from 0)."""
        return min(self.end, self.start + self.add * (step // self.every))


class UntilSpec(Spec):
    """When a training ends before its last step: as soon as it is good enough, or as it is hopeless.

    metric: of the tasks; None takes the task's own. It is that of the tasks as they are at the end of a curriculum, and
        of several tasks each must reach the goal.
    at_least, at_most: the goal; one of the two, or none where `hopeless` is given.
    hopeless: share of the steps. From there on a look ends the training where the metric's 95% interval over prompts is
        not on the better side of chance (`Task.chance`) and the metric is no better than at the look before; of several
        tasks, where this is so of each. None never does.
    every: steps between looks at the validation prompts; the last step is one, too.
    prompts: of each task, the same at each look; never those of training, of `evaluate`, or of a sweep's validation.
    seed: of these prompts.
    """

    metric: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    hopeless: Annotated[float, Field(gt=0, lt=1)] | None = None
    every: PositiveInt = 50
    prompts: PositiveInt = 256
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _one_goal(self) -> UntilSpec:
        goals = (self.at_least is not None) + (self.at_most is not None)
        if goals > 1 or (goals == 0 and self.hopeless is None):
            raise InputError(
                "give either at_least (for example 0.995 of an accuracy) or at_most (of an error), and beside it or "
                "alone hopeless (a share of the steps, for example 0.5)"
            )
        if self.hopeless is not None and self.prompts < 2:
            raise InputError("hopeless: the interval of one prompt is not known; give prompts, at least 2")
        return self


Patterns = Annotated[tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)]
"""Over names, such as "blocks.0.*"; one may stand without a list."""


class LoraSpec(Spec):
    """Low-rank adapters (LoRA, 2106.09685), which are trained in the place of the model's own parameters.

    rank: of each adapter B A, which is added to a layer's matrix times alpha / rank; at most that of the largest layer.
    alpha: None is `rank`.
    targets: patterns over names of linear layers, such as "*.mixer.*"; the read-in and the read-out only where they are
        named.
    also: patterns over names of parameters that are trained whole beside, such as "read_out.*", new ones above all.
    dora: a length of its own for each of a matrix's rows beside (DoRA, 2402.09353).
    keep_zeros: weights that are exactly zero stay so: B A counts where the matrix has numbers (SparsePEFT,
        2410.03750), in training as after it.
    """

    kind: ClassVar[str] = "lora"

    rank: PositiveInt = 8
    alpha: PositiveFloat | None = None
    targets: Patterns = ("blocks.*",)
    also: Patterns = ()
    dora: bool = False
    keep_zeros: bool = False

    @model_validator(mode="after")
    def _some(self) -> LoraSpec:
        if not self.targets:
            raise InputError('targets: expected patterns over names of linear layers, for example ["blocks.*"]')
        if self.dora and self.keep_zeros:
            raise InputError("dora and keep_zeros: the lengths of DoRA's rows are not of masked ones; leave one out")
        return self


class Ia3Spec(Spec):
    """A factor for each output of linear layers, trained in place of the model's own parameters ((IA)^3, 2205.05638).

    The paper has one for each key, value and hidden channel of an MLP; mixers here make queries, keys and values, or
    what they have in their place, by one matrix, so that queries have one, too. All start as 1.

    targets: patterns over names of linear layers; the read-in and the read-out only where they are named.
    inputs: patterns over names of those among them that have a factor for each input, such as an MLP's matrix out,
        whose inputs are the hidden channels. None may match.
    also: patterns over names of parameters that are trained whole beside, such as "read_out.*".
    """

    kind: ClassVar[str] = "ia3"

    targets: Patterns = ("blocks.*.mixer.*", "blocks.*.mlp.out_proj")
    inputs: Patterns = ("*.mlp.out_proj",)
    also: Patterns = ()

    @model_validator(mode="after")
    def _some(self) -> Ia3Spec:
        if not self.targets:
            raise InputError('targets: expected patterns over names of linear layers, for example ["blocks.*"]')
        return self


class TrainSpec(Spec):
    """How a model is trained.

    steps: optimiser steps; 0 leaves the model as it is. Where `epochs` is given it follows from that.
    batch: prompts a step (over all processes, all accumulated parts together).
    examples: prompts in a fixed training set, drawn once from the seed; None draws fresh ones at each step. An epoch
        shows each of them once, in an order of its own; a batch may hold the end of one epoch and the beginning of the
        next. Of several tasks each has a set of so many. Prompts of an evaluation that are in the set do not count.
    epochs: how often each of the `examples` is shown, in the place of `steps`; for a training on one task.
    optimizer: "adamw"; "muon": Muon for the matrices inside the blocks and AdamW for the rest; or "package.Class", any
        optimiser of torch.optim, schedulefree, prodigyopt, heavyball or a plugin, for all parameters. One with methods
        `train` and `eval` is schedule-free: its rate is `learning_rate` at each step.
    optimizer_options: of such a class, as its constructor takes them.
    learning_rate: peak, of AdamW and of such a class.
    matrix_learning_rate: peak, of Muon's matrices, before the factor max(1, rows / columns)^0.5.
    betas: AdamW's.
    weight_decay: decoupled (of another class: as it has it); for matrices only.
    warmup: steps of linear warm-up.
    final_fraction: the cosine schedule ends at this fraction of the peak.
    clip: largest global gradient norm; None for no clipping.
    accumulate: equal parts that a batch is cut into, to save memory; loss and gradient stay those of the whole batch,
        as each part counts by its number of scored positions.
    precision: "auto" is bfloat16 autocast on CUDA and float32 elsewhere.
    compile: "auto" compiles on CUDA when the run is long enough to pay for it, never on CPU.
    curriculum: task option -> how it grows.
    order: of several tasks, where a model is trained on more than one: which of them a step draws from (2404.03558).
        "sequential": the steps are cut into as many equal blocks as there are tasks, one task a block; "mixed": an
        even choice at each step among the block's task and those of earlier blocks; "random": among all.
    freeze: patterns over names of parameters, such as "blocks.0.*" or "*.mlp.*", that stay as they are: they have no
        gradient, no optimiser state and no weight decay.
    lora: adapters that are trained alone, with AdamW where the optimizer is muon; the model that comes out has them
        merged into its weights. None: none.
    ia3: factors that are trained alone, in the same way. None: none.
    layer_skip: layers dropped at random and a loss of early answers, for a model that is to answer after any layer
        (LayerSkip, 2404.16710). None: none.
    until: ends the training as soon as the model is good enough, or where it is hopeless; `steps` are then the most.
    log_every: steps between recorded losses.
    checkpoint_every: steps between checkpoints; 0 for none but the last.
    keep_checkpoints: every checkpoint stays, for probes of how the training went (`formation`); else the last two. Each
        takes as much room as the weights and the optimiser's numbers.
    """

    steps: NonNegativeInt = 2000
    batch: PositiveInt = 128
    examples: PositiveInt | None = None
    epochs: PositiveInt | None = None
    optimizer: str = "muon"
    optimizer_options: dict[str, Any] | None = None
    learning_rate: PositiveFloat = 1e-3
    matrix_learning_rate: PositiveFloat = 0.02
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.0
    warmup: NonNegativeInt = 50
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip: PositiveFloat | None = 1.0
    accumulate: PositiveInt = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    curriculum: dict[str, CurriculumSpec] = Field(default_factory=dict)
    order: Order = "random"
    freeze: Patterns | None = None
    lora: LoraSpec | None = None
    ia3: Ia3Spec | None = None
    layer_skip: LayerSkipSpec | None = None
    until: UntilSpec | None = None
    log_every: PositiveInt = 10
    checkpoint_every: NonNegativeInt = 500
    keep_checkpoints: bool = False

    @model_validator(mode="after")
    def _possible(self) -> TrainSpec:
        self._check_optimizer()
        if self.lora is not None and self.ia3 is not None:
            raise InputError("lora and ia3: a model has adapters of one kind; leave one of the two out")
        if self.adapter is not None and self.freeze:
            kind = self.adapter.kind
            raise InputError(f"freeze and {kind}: {kind} trains its adapters and `also` alone; leave freeze out")
        if self.ia3 is not None and self.weight_decay:
            raise InputError("weight_decay and ia3: it draws factors to 0, which would silence them; leave one out")
        if self.batch % self.accumulate:
            raise InputError(f"batch {self.batch} is not divisible by accumulate {self.accumulate}")
        if self.examples is not None and self.curriculum:
            raise InputError(
                "examples and curriculum: a fixed set cannot grow with a curriculum; leave one of the two out"
            )
        if self.epochs is None:
            return self
        if self.examples is None:
            raise InputError(f"epochs {self.epochs}: of which prompts? give examples, or steps in the place of epochs")
        steps = math.ceil(self.epochs * self.examples / self.batch)
        if "steps" in self.model_fields_set and self.steps != steps:
            raise InputError(
                f"steps {self.steps} and epochs {self.epochs}, which take {steps} steps: give one of the two, and null "
                "for the other"
            )
        self.__dict__["steps"] = steps  # it was not given: what is written of the spec leaves it out
        return self

    def identity(self) -> dict[str, Any]:
        """What decides what is learned, as plain data: all but which checkpoints stay."""
        return self.model_dump(mode="json", exclude={"keep_checkpoints"})

    @property
    def adapter(self) -> LoraSpec | Ia3Spec | None:
        """The adapters that are trained in the place of the model's own parameters, of whatever kind."""
        return self.lora if self.lora is not None else self.ia3

    def _check_optimizer(self) -> None:
        parts = self.optimizer.split(".")
        if self.optimizer not in OPTIMIZERS and (len(parts) < 2 or not all(part.isidentifier() for part in parts)):
            known = [*OPTIMIZERS, "torch.optim.SGD", "schedulefree.AdamWScheduleFree"]
            raise InputError(f"optimizer: {unknown('optimizer', self.optimizer, known)}")
        if not self.optimizer_options:
            return
        if self.optimizer in OPTIMIZERS:
            raise InputError(
                f"optimizer_options: are for a class such as torch.optim.SGD; {self.optimizer} has learning_rate, "
                "betas and weight_decay"
            )
        for name, instead in (("lr", "learning_rate"), ("weight_decay", "weight_decay"), ("params", "freeze")):
            if name in self.optimizer_options:
                raise InputError(f"optimizer_options.{name}: give train.{instead} in its place")
