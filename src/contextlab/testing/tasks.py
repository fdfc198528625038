"""The laws of tasks. Each is put to the task in every option case that it was registered with."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from contextlab import registry
from contextlab.errors import InputError
from contextlab.prompt import HIGHER_IS_BETTER, Learner, Prompt, Task, asked_at
from contextlab.tasks.base import TokenTask
from contextlab.testing.law import Component, law, refused, require
from contextlab.testing.options import a_case, first_case, hold_to_options, same

SHOWS_ITS_ANSWERS = {"mad_compression": "it asks for what was shown", "count_and_copy": "it asks for what was shown"}
"""Tasks that the law "hidden answers" does not hold for, with the reason."""
UNEVEN_ANSWERS = {
    "phonebook": "the first digits of its numbers are four, the others ten",
    "induction_head_trigger=any": "the trigger of a prompt is no answer of that prompt",
}
"""Tasks of tokens (or option=value of one) whose chance is not even odds among all answers, with the reason."""


SPLITS_ALIKE = {
    ("ruler", "documents=test"): "variable tracking and frequent words read no documents",
    ("text_classification_part=test", "documents=test"): "its documents are the held-out ones already",
    ("text_retrieval_part=test", "documents=test"): "its documents are the held-out ones already",
}
"""(task, or task_option=value, split) that may draw the prompts of 'train', with the reason."""


def cases(entry: registry.Entry) -> Iterator[Component]:
    """A registered task in each of its option cases."""
    for options in entry.cases:
        yield Component("task", entry.name, entry.factory, options, functools.partial(entry.build, **options))


def _called(component: Component) -> set[str]:
    return {component.name, *(f"{component.name}_{key}={value}" for key, value in component.options.items())}


def generator(seed: int) -> torch.Generator:
    """A fresh one on the CPU."""
    return torch.Generator().manual_seed(seed)


def hold_to_prompts(task: Task) -> None:
    """A prompt of two rows: shapes, ranges of tokens, words."""
    prompt = task.sample(2, generator(0))
    words = task.words(prompt, 1)
    require(words and not words.isspace(), "words(prompt) is empty")
    shape = prompt.inputs.shape[:2]
    for name in ("targets", "scored", "shot"):
        got = getattr(prompt, name).shape[:2]
        require(got == shape, f"{name} [{list(got)}] and inputs [{list(shape)}] differ in batch or length")
    require(prompt.scored.dtype == torch.bool, f"scored is {prompt.scored.dtype}, expected torch.bool")
    require(prompt.scored.any(1).all(), "a prompt has no scored position")
    once = not task.one_prediction or bool((prompt.scored.sum(1) == 1).all())
    require(once, "a prompt has more than one scored position, and the task says one_prediction")
    require(prompt.shot.min() >= 0, "shot is negative")
    if task.read_in == "token":
        low, high = int(prompt.inputs.min()), int(prompt.inputs.max())
        require(low >= 0 and high < task.input_size, f"tokens {low}..{high}, expected 0..{task.input_size - 1}")
        high = int(prompt.targets[prompt.scored].max())
        require(high < task.output_size, f"target {high}, expected at most {task.output_size - 1}")
    else:
        size = prompt.inputs.shape[2]
        require(size == task.input_size, f"inputs are {size} wide, input_size is {task.input_size}")
        require(prompt.inputs.isfinite().all(), "inputs are not finite")


@law("task", "prompts", "Its prompts have the shapes, token ids and words that it says.")
def prompts(component: Component) -> None:
    """In the component's own options."""
    hold_to_prompts(component.build())


@law(
    "task",
    "presets",
    "Its presets draw prompts of the shapes and token ids that they say.",
    holds_for=first_case,
)
def presets(component: Component) -> None:
    """And of the task without any option, where that is possible."""
    entry = registry.lookup("task", component.name)
    plain = {} if all(not p.required for p in entry.parameters) else component.options
    for options in (plain, *component.factory.presets.values()):  # type: ignore[attr-defined]
        hold_to_prompts(entry.build(**options))


@law("task", "seed", "Equal generators draw equal prompts, others draw others.")
def seed(component: Component) -> None:
    """64 prompts."""
    task = component.build()
    prompt, again, other = (task.sample(64, generator(n)) for n in (3, 3, 4))
    for name in ("inputs", "targets", "scored", "shot"):
        require(torch.equal(getattr(prompt, name), getattr(again, name)), f"the same seed draws other {name}")
    require(not torch.equal(prompt.inputs, other.inputs), "another seed draws the same inputs")


@law("task", "next batch", "A generator's next batch has other prompts.")
def next_batch(component: Component) -> None:
    """Nothing is drawn from a seed of the task's own."""
    task, drawn = component.build(), generator(5)
    first, second = task.sample(16, drawn), task.sample(16, drawn)
    same = (first.inputs == second.inputs).flatten(1).all(1) if first.inputs.shape == second.inputs.shape else None
    require(same is None or not same.all(), "the next batch has the same prompts")


def learners_of(task: Task) -> Mapping[str, Learner]:
    """The task's learners by name. Raises InputError where it returns anything else."""
    found = task.learners()
    if not isinstance(found, Mapping):
        raise InputError(
            f"{type(task).__name__}.learners(): expected a dict from name to learner, got {type(found).__name__}"
        )
    return found


@law("task", "best learner", "Its first learner answers every prompt, finitely and better than chance.")
def best_learner(component: Component) -> None:
    """In every metric that `chance` names; there is at least one."""
    task = component.build()
    prompt = task.sample(64, generator(3))
    learners = learners_of(task)
    require(learners, "learners() is empty; name the best known one first")
    require("oracle" not in next(iter(learners)), "an oracle is named first; the best known learner is no oracle")
    answer = next(iter(learners.values()))(prompt)
    expected = (*prompt.inputs.shape[:2], task.output_size)
    require(answer.shape == expected, f"it answers {list(answer.shape)}, expected {list(expected)}")
    require(answer.isfinite().all(), "its answers are not finite")
    errors = task.errors(answer, prompt)
    require(task.metric in errors, f"errors has no {task.metric!r}, the task's metric")
    require(task.chance(), "chance() is empty: say what a predictor gets that has learned nothing")
    for metric, chance in task.chance().items():
        got = errors[metric][prompt.scored].double().mean().item()
        higher = task.higher_is_better if metric == task.metric else metric in HIGHER_IS_BETTER
        require(got > chance if higher else got < chance, f"{metric} is {got:.4g}, chance {chance:.4g}")


@law("task", "best first", "No learner but an oracle is better than the first, the best known one.")
def best_first(component: Component) -> None:
    """In the task's metric, by more than four standard errors over the same 16 prompts."""
    task = component.build()
    first, *others = learners_of(task).items()
    prompt = task.sample(16, generator(4))
    reference = of_prompts(task, prompt, first[1](prompt))[task.metric] if others else None
    for name, learner in others:
        if "oracle" in name or reference is None:
            continue
        won = of_prompts(task, prompt, learner(prompt))[task.metric] - reference
        won = won if task.higher_is_better else -won
        sure = won.mean().item() - 4 * won.std().item() / math.sqrt(len(won))
        require(sure <= 1e-6, f"{name} is better than {first[0]}, by {won.mean().item():.3g} of {task.metric}")


def of_prompts(task: Task, prompt: Prompt, prediction: Tensor) -> dict[str, Tensor]:
    """Each metric's mean in each prompt, [B]."""
    scored = prompt.scored.double()
    errors = task.errors(prediction, prompt)
    return {metric: (each.double() * scored).sum(1) / scored.sum(1) for metric, each in errors.items()}


@law("task", "chance", "chance() is what guessing gets.")
def chance(component: Component) -> None:
    """Of tokens an even guess among the answers; else zeros, or random numbers where a choice is scored."""
    task = component.build()
    said = task.chance()
    if isinstance(task, TokenTask):
        metrics = ", ".join(said) or "nothing"
        require(
            "cross_entropy" in said,
            f"chance() tells {metrics}; of tokens it tells cross_entropy, the log of the answers there are",
        )
        prompt = task.sample(256, generator(1))
        # An even guess among as many answers as chance stands for covers all that are asked for.
        asked = prompt.targets[prompt.scored].unique().numel()
        if not _called(component) & UNEVEN_ANSWERS.keys():
            among = round(math.exp(said["cross_entropy"]))
            require(asked <= among, f"{asked} answers are asked for, chance stands for {among}")
            accuracy = said.get("accuracy", 0)
            even = math.exp(-said["cross_entropy"])
            require(accuracy == 0 or math.isclose(accuracy, even, rel_tol=1e-6), f"{accuracy} is not 1 in {among}")
        return
    prompt = task.sample(4000, generator(1))
    shape = (*prompt.inputs.shape[:2], task.output_size)
    nothing = of_prompts(task, prompt, torch.zeros(shape))
    guessed = of_prompts(task, prompt, torch.randn(shape, generator=generator(2)))
    for metric, value in said.items():
        got = (guessed if metric in ("accuracy", "error_rate", "suboptimality") else nothing)[metric]
        spread = 5 * got.std().item() / math.sqrt(len(got)) + 0.02 * value  # some are Monte-Carlo means themselves
        found = got.mean().item()
        require(abs(found - value) < spread, f"{metric} of guesses is {found:.4g}, chance says {value:.4g}")


@law("task", "hidden answers", "No token shows the answer that is asked for at it.")
def hidden_answers(component: Component) -> None:
    """Nor do the three tokens before it, in nine of ten cases."""
    task = component.build()
    if task.read_in != "token" or component.name in SHOWS_ITS_ANSWERS:
        return
    prompt = task.sample(32, generator(1))
    for back in range(4):
        shown = prompt.inputs.roll(back, 1)
        shown[:, :back] = -1
        told = (shown == prompt.targets)[prompt.scored].float().mean().item()
        require(told < 0.9, f"{told:.0%} of the answers stand {back} tokens before")


@law("task", "corrupted", "A corrupted prompt asks the same in a context that gives another answer, or it tells none.")
def corrupted(component: Component) -> None:
    """In three of four rows at least (few functions of a class may answer otherwise), where the best learner prefers
    that answer; the prompt stays as it was.
    """
    task = component.build()
    prompt = task.sample(64, generator(13))
    before = {name: tensor.clone() for name, tensor in prompt.tensors().items()}
    try:
        found, again = (task.corrupt(prompt, generator(14)) for _ in range(2))
    except InputError as error:
        require("\n" not in str(error), "it is refused in more than one line")
        return
    require(all(torch.equal(prompt.tensors()[name], each) for name, each in before.items()), "the prompt has changed")
    require(same(list(marks_of_prompt(found)), list(marks_of_prompt(again))), "the same seed corrupts otherwise")
    for name in ("inputs", "targets", "scored", "shot"):
        old, new = getattr(prompt, name), getattr(found, name)
        told = f"{new.dtype} {list(new.shape)}, expected {old.dtype} {list(old.shape)}"
        require(old.shape == new.shape and old.dtype == new.dtype, f"{name} is {told}")
    if task.read_in == "token":
        require(int(found.inputs.min()) >= 0 and int(found.inputs.max()) < task.input_size, "a token is none")
    at = asked_at(prompt, found)
    known = at >= 0
    require(known.double().mean() >= 0.75, f"in {(~known).sum()} of 64 rows the question has no other answer")
    answer = next(iter(learners_of(task).values()))(found)
    own, clean = (
        task.errors(answer, dataclasses.replace(found, targets=each))[task.metric]
        for each in (found.targets, prompt.targets)
    )
    rows = torch.arange(64)[known]
    better = (own - clean)[rows, at[known]].double().mean().item()
    require(better > 0 if task.higher_is_better else better < 0, "its best learner answers as to the clean prompt")


def sizes(factory: type) -> list[str]:
    """The options of a task that are whole numbers."""
    hints = typing.get_type_hints(factory)  # without what pydantic adds
    options = [each.name for each in dataclasses.fields(factory)]
    return [name for name in options if int in (hints[name], *typing.get_args(hints[name]))]


def hold_to_small_sizes(entry: registry.Entry, option: str) -> None:
    """One option of a task at -1, 0, 1 and 2."""
    refused(lambda: entry.build(**{**entry.cases[0], option: -1}), option)
    for size in (0, 1, 2):
        try:
            use(entry.build(**{**entry.cases[0], option: size}))
        except InputError as error:
            message = str(error)
            wrong = "\n" in message or "at most 0" in message or "at most -" in message
            require(not wrong, f"{option}={size} is refused by {message!r}: say in one line what would do")


def use(task: Task) -> None:
    """Everything that one does with a task."""
    prompt = task.sample(1, generator(0))
    shape = prompt.inputs.shape[:2]
    require(shape == prompt.scored.shape == prompt.shot.shape == prompt.targets.shape[:2], "shapes differ")
    require(prompt.scored.any(), "nothing is scored")
    require(isinstance(task.words(prompt), str), "words() is no text")
    require(task.facets(prompt), "facets() is empty")
    for name, learner in learners_of(task).items():
        answer = learner(prompt)
        expected = (1, prompt.length, task.output_size)
        require(answer.shape == expected, f"{name} answers {list(answer.shape)}, expected {list(expected)}")
        require(answer.isfinite().all(), f"the answers of {name} are not finite")
    require(next(iter(task.splits())) == "train", "the first split is not 'train'")


@law(
    "task",
    "small sizes",
    "Small sizes work, or one line says what would.",
    holds_for=first_case,
)
def small_sizes(component: Component) -> None:
    """-1 is refused."""
    entry = registry.lookup("task", component.name)
    for option in sizes(component.factory):  # type: ignore[arg-type]
        hold_to_small_sizes(entry, option)


@law("task", "splits", "A split with other options draws other prompts than the training distribution.")
def splits(component: Component) -> None:
    """From the same generator; the first split is the task itself, called 'train'."""
    task = component.build()
    found = task.splits()
    require(next(iter(found), None) == "train", f"the first split is {next(iter(found), None)!r}, expected 'train'")
    drawn = {name: list(marks_of_prompt(split.sample(32, generator(9)))) for name, split in found.items()}
    require(same(drawn["train"], list(marks_of_prompt(task.sample(32, generator(9))))), "'train' is not the task")
    for name, split in found.items():
        # It may be the task itself, as one in a row of sizes.
        alike = _equal_options(split, task) or any((who, name) in SPLITS_ALIKE for who in _called(component))
        if name != "train" and not alike:
            require(not same(drawn[name], drawn["train"]), f"split {name!r} draws the prompts of 'train'")


def _equal_options(one: Task, other: Task) -> bool:
    options = [each.name for each in dataclasses.fields(one) if each.init]
    return type(one) is type(other) and all(same(getattr(one, name), getattr(other, name)) for name in options)


def marks_of_prompt(prompt: Prompt) -> Iterator[Any]:
    """All that a prompt holds."""
    for each in dataclasses.fields(prompt):
        yield getattr(prompt, each.name)


def marks(entry: registry.Entry, options: Mapping[str, Any]) -> Iterator[Any]:
    """What a task's options may change: prompts, sizes, what is scored and how, chance, splits, learners."""
    task = entry.build(**options)
    prompt = task.sample(8, generator(10))
    yield from marks_of_prompt(prompt)
    yield [task.read_in, task.input_size, task.output_size, dict(task.chance()), list(task.splits())]
    yield {name: [type(learner), vars(learner)] for name, learner in learners_of(task).items()}
    shape = (*prompt.inputs.shape[:2], task.output_size)
    answer = torch.randn(shape, generator=generator(11))
    yield [task.loss(answer, prompt), dict(task.errors(answer, prompt)), dict(task.facets(prompt))]
    for split in task.splits().values():
        yield from marks_of_prompt(split.sample(4, generator(12)))


@law("task", "options", "Every option counts: another value changes something, or is refused.", holds_for=a_case)
def options(component: Component) -> None:
    """Of prompts, scores, chance, splits, learners."""
    entry = registry.lookup("task", component.name)
    hold_to_options(component, lambda options: marks(entry, options))
