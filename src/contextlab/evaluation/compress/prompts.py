"""The prompts on which policies are compared, and where their questions begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from contextlab import registry
from contextlab.errors import InputError, unknown
from contextlab.models import HuggingFaceModel, Model
from contextlab.policies import parse_options
from contextlab.prompt import Prompt, Task
from contextlab.tasks import build_task

AnyModel = Model | HuggingFaceModel

ALIASES = {"text": "language_modelling", "mqar": "associative_recall"}
SIZED = {"kv_retrieval": "pairs", "dictionary_retrieval": "dictionaries"}
"""Tasks whose length follows from another option."""
DECODED = 128
"""Tokens that are read one by one, at most, where no question says where to begin: it takes long."""


def check_prompts(text: str) -> None:
    """Refuse a text that `build_prompts` would refuse for any model: by its name or its options. Raises InputError."""
    entry, options = _named(text)
    entry.check(options)


def _named(text: str) -> tuple[registry.Entry, dict[str, Any]]:
    """The task that a text names, and its options. Raises InputError."""
    name, options = parse_options(text, "task")
    name = ALIASES.get(name, name)
    if name not in registry.names("task"):
        raise InputError(unknown("task", name, [*registry.names("task"), *ALIASES]))
    if "length" in options:
        raise InputError(
            f"task {name}: length is no option here; give it as --lengths {options['length']} (advise: --at)"
        )
    return registry.lookup("task", name), options


def build_prompts(text: str, length: int, model: AnyModel, tokenizer: Any = None, part: str = "test") -> Task:
    """The task that a text such as "needle:depth=0.5" names, its prompts of about `length` tokens.

    part: of the task's documents and names, where it tells training's from those of the test. Associative recall takes
    256 symbols, or as many as the model knows, and a pair for eight tokens, unless options say otherwise.

    Raises InputError where it has no length, or the model cannot read it.
    """
    entry, options = _named(text)
    name = entry.name
    known = {each.name for each in entry.parameters}
    read_in, size = entry.factory.read_in, model.spec.input_size or 0  # type: ignore[attr-defined]
    if model.spec.read_in != "token":
        raise InputError("compress: the model reads vectors; expected one that reads tokens, such as recipe byte-lm's")
    if read_in != "token":
        raise InputError(f"task {name!r} shows vectors, and the model reads tokens; needle, kv_retrieval, mqar do")
    if "part" in known:
        options.setdefault("part", part)
    if "tokenizer" in known and tokenizer is not None:
        options.setdefault("tokenizer", tokenizer)
    if name == "associative_recall":
        vocabulary = options.setdefault("vocabulary", min(256, size // 2 * 2))
        options.setdefault("pairs", max(1, min(vocabulary // 2, length // 8)))
        options.setdefault("test_pairs", [])
    if name in SIZED and SIZED[name] not in options:
        few, more = (_longest(build_task(name, **{**options, SIZED[name]: n})) for n in (2, 3))
        count = 2 + (length - few) // max(1, more - few)
        if count < 2:
            raise InputError(f"--lengths: {length} is too short for {name}, whose prompts take at least {few} tokens")
        options[SIZED[name]] = count
    elif "length" in known:
        options["length"] = length
    elif name not in SIZED:
        raise InputError(f"task {name!r} has no length to set; needle, kv_retrieval, mqar and text have")
    task = build_task(name, **options)
    if task.input_size > size:
        raise InputError(
            f"task {text!r} shows {task.input_size} token ids, and the model knows {size}; give a task of its tokens, "
            f"such as mqar:vocabulary={size // 2 * 2}, or a model trained on this one"
        )
    return task


def is_text(text: str) -> bool:
    """Whether a task as it was written is language modelling."""
    name = parse_options(text, "task")[0]
    return ALIASES.get(name, name) == "language_modelling"


def _longest(task: Task) -> int:
    return task.sample(1, torch.Generator().manual_seed(0)).length


@dataclass(frozen=True)
class Drawn:
    """Prompts, and the token at which their question begins (of all rows: the earliest)."""

    prompt: Prompt
    question: int

    @property
    def tail(self) -> Prompt:
        """The question and what follows it."""
        return columns(self.prompt, slice(self.question, None))

    @property
    def answer(self) -> int:
        """The first token from which on prompts are read token by token: the earliest at which a prediction counts."""
        return self.question + int(self.tail.scored.any(0).int().argmax())


def draw(task: Task, count: int, seed: int, device: torch.device, decoded: int = DECODED) -> Drawn:
    prompt = task.sample(count, torch.Generator(device).manual_seed(seed), device)
    if prompt.hidden is not None and "question" in prompt.hidden:
        question = int(prompt.hidden["question"].min())
        return Drawn(prompt, question)
    if bool(prompt.scored.all()):
        question, last = prompt.length - min(prompt.length // 4, decoded), prompt.length
    else:
        question = int(prompt.scored.int().argmax(1).min())
        last = question + decoded
    return Drawn(columns(prompt, slice(last)), max(1, question))


def columns(prompt: Prompt, cut: slice) -> Prompt:
    """A part of the tokens of prompts."""
    return Prompt(prompt.inputs[:, cut], prompt.targets[:, cut], prompt.scored[:, cut], prompt.shot[:, cut])
