"""EvaluateSpec and CompressSpec: what is measured after training, as data."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from contextlab.spec import Spec


class EvaluateSpec(Spec):
    """What is measured after training.

    prompts: prompts drawn for each split; every predictor answers the same ones.
    batch: prompts answered at once.
    seed: of the prompts; never that of training.
    splits: the task's splits to measure, by name; None for all. "length=512", or another option with a value, is one
        of any task that has the option.
    learners: names of the task's learners to compare with; None for all.
    similarity: prompts of the train split, at most, on which each model is compared with every learner (see
        `similarity`); fewer where they would hold more than 16,384 tokens. 0 for none.
    rollouts: problems of a decision task that each model and learner plays online (see `decisions.regret`). 0 for none.
    """

    prompts: PositiveInt = 1024
    batch: PositiveInt = 256
    seed: NonNegativeInt = 20_000
    splits: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    learners: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    similarity: NonNegativeInt = 128
    rollouts: NonNegativeInt = 128


class CompressSpec(Spec):
    """What a trained model loses when policies keep a part of its context; see `evaluation.compress.compress`.

    model: of the results, trained once a seed; of a training on several tasks "MODEL+NAME".
    compare: other such models, which read the same prompts with states of their own.
    policies: such as "snapkv", "h2o:window=8", "snapkv|quantize:bits=4". What one does not allow at some budget is left
        out, and the page says so.
    budgets: such as "10%", "512tok", "64MB".
    tasks: tasks on tokens that have a length, "text" and "mqar" among them, and options: "needle:depth=0.5".
    lengths: tokens of the prompts, about.
    prompts: for each task, length and seed. batch: prompts at once.
    decoded: tokens of text, and of recall, that are read one by one, at most.
    fit: steps by which policies that must be trained are.
    """

    model: str
    compare: tuple[str, ...] = ()
    policies: Annotated[tuple[str, ...], Field(min_length=1)]
    budgets: tuple[str, ...] = ("50%", "25%", "10%", "5%", "2%")
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("needle", "text")
    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (512,)
    prompts: Annotated[int, Field(ge=2)] = 32
    batch: PositiveInt = 16
    decoded: PositiveInt = 128
    fit: NonNegativeInt = 0
