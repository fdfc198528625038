"""What a model is read on while it is converted: the inputs of its layers, its loss, its hidden stream."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError, check_whole
from contextlab.models.answer import answer
from contextlab.models.within import Within
from contextlab.prompt import Prompt, Task, task_name, wide
from contextlab.training.distributed import seeded
from contextlab.training.trainer import check_sizes

AT_ONCE = 1 << 30
"""Bytes of second moments that are gathered in one pass over the data; more layers take more passes."""

Loss = Callable[[Tensor, Prompt], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Batches of prompts, each with the loss that is meant.

    batches: prompts, and what makes a scalar of predictions and prompts, a mean over the scored positions.
    name: what they are, in a few words.
    """

    batches: tuple[tuple[Prompt, Loss], ...]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.batches:
            raise InputError("calibration: expected at least one batch of prompts, got none")

    @classmethod
    def of_task(
        cls,
        tasks: Task | Sequence[Task],
        prompts: int = 64,
        *,
        batch: int = 16,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> Calibration:
        """Prompts of one or several tasks, so many of each; never those that training or an evaluation draws."""
        check_whole(prompts=(prompts, 1), batch=(batch, 1))
        given = [tasks] if isinstance(tasks, Task) else list(tasks)
        batches: list[tuple[Prompt, Loss]] = []
        for place, task in enumerate(given):
            generator = seeded("calibration", seed, place, device=device)
            sizes = [min(batch, prompts - start) for start in range(0, prompts, batch)]
            batches += [(task.sample(size, generator, device), task.loss) for size in sizes]
        return cls(tuple(batches), ", ".join(map(task_name, given)))

    @classmethod
    def of_tokens(cls, tokens: Tensor, *, batch: int = 16) -> Calibration:
        """Sequences of a language model, tokens [N, T] int64, T at least 2; the loss is that of each next token."""
        if tokens.ndim != 2 or tokens.shape[1] < 2 or tokens.is_floating_point():
            raise InputError(f"calibration: expected token ids [N, T], T at least 2, got {list(tokens.shape)}")
        batches: list[tuple[Prompt, Loss]] = []
        for part in tokens.split(batch):
            seen = torch.arange(1, part.shape[1], device=part.device).expand(len(part), -1)
            scored = torch.ones_like(seen, dtype=torch.bool)
            batches.append((Prompt(part[:, :-1], part[:, 1:], scored, seen), _next_token_loss))
        return cls(tuple(batches), "tokens")

    @property
    def tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(prompt.batch * prompt.length for prompt, _ in self.batches)

    def check(self, model: Any, tasks: Sequence[Task] = ()) -> None:
        """Raises InputError where the prompts, or tasks, are of other sizes than the model's."""
        for task in tasks:
            check_sizes(model, task)
        spec = model.spec
        for prompt, _ in self.batches:
            inputs = prompt.inputs
            reads = "token" if inputs.ndim == 2 else "vector"
            if reads != spec.read_in:
                raise InputError(f"calibration: the model reads {spec.read_in}s, the data are {reads}s")
            if reads == "token" and int(inputs.max()) >= spec.input_size:
                raise InputError(
                    f"calibration: the model has {spec.input_size} tokens, the data have one of number "
                    f"{int(inputs.max())}; give data of the model's own vocabulary"
                )

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """The mean loss of a model over all scored positions."""
        total, count = 0.0, 0
        for prompt, loss in self.on(model):
            scored = int(prompt.scored.sum())
            total += float(loss(answer(model, prompt), prompt)) * scored
            count += scored
        return total / max(1, count)

    @torch.no_grad()
    def inputs_of(self, model: Any, names: Iterable[str]) -> dict[str, Tensor]:
        """X^T X of each named layer's inputs X, name -> [I, I] float64 on the model's device, over all tokens.

        names: of layers that are called with one tensor [..., I]. A layer that is called many times (looped or shared)
        has the inputs of all its calls. Where the moments take more than `AT_ONCE` bytes, the data are read again.

        Raises InputError for a layer that none of the data reaches.
        """
        found: dict[str, Tensor] = {}

        def add(name: str, x: Tensor) -> None:
            product = x.double().T @ x.double()
            found[name] = found[name].add_(product) if name in found else product

        for group in _groups(model, list(names)):
            self._read(model, group, add)
        return found

    @torch.no_grad()
    def mean_sizes_of(self, model: Any, names: Iterable[str]) -> dict[str, Tensor]:
        """The mean of |x| over all tokens of each named layer's inputs x: name -> [I] float64."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def add(name: str, x: Tensor) -> None:
            sums[name] = sums.get(name, 0.0) + x.double().abs().sum(0)
            counts[name] = counts.get(name, 0) + len(x)

        self._read(model, list(names), add)
        return {name: total / counts[name] for name, total in sums.items()}

    @torch.no_grad()
    def rows_of(self, model: Any, names: Iterable[str], count: int = 512) -> dict[str, Tensor]:
        """Inputs of each named layer at about `count` tokens, evenly spaced: name -> [N, I], N at most `count`."""
        check_whole(count=(count, 1))
        each = -(-count // len(self.batches))
        found: dict[str, list[Tensor]] = {}

        def add(name: str, x: Tensor) -> None:
            step = max(1, len(x) // each)
            found.setdefault(name, []).append(x[::step][:each].clone())

        self._read(model, list(names), add)
        return {name: torch.cat(parts)[:count] for name, parts in found.items()}

    def onward(self) -> Calibration:
        """The same prompts for a model that is changed block by block, in order: no block is read from the start again.

        Between two calls for layers of one model, the blocks before those that were asked for first must not change.
        What the blocks are given is kept, in up to `AT_ONCE` bytes; the numbers are the same, bit for bit.
        """
        return _Onward(self.batches, self.name)

    def on(self, model: Any) -> Iterator[tuple[Prompt, Loss]]:
        """The batches on the model's device and, of vectors, in its dtype."""
        parameter = next(model.parameters())
        for prompt, loss in self.batches:
            yield prompt.to(parameter.device, parameter.dtype), loss

    def _read(self, model: Any, names: Sequence[str], add: Callable[[str, Tensor], None]) -> None:
        """Call `add` with each named layer's inputs [N, I] at each call of it."""
        reached: set[str] = set()

        def noting(name: str) -> Callable[..., None]:
            def note(module: Any, given: tuple[Tensor, ...]) -> None:
                reached.add(name)
                add(name, given[0].detach().reshape(-1, given[0].shape[-1]))

            return note

        hooks = [model.get_submodule(name).register_forward_pre_hook(noting(name)) for name in names]
        if (above := _first_above(model, names)) is not None:
            hooks.append(above.register_forward_pre_hook(_stop))
        try:
            for number, (prompt, _) in enumerate(self.on(model)):
                with suppress(_Enough):
                    answer(model, prompt, self._begin(number))
        finally:
            for hook in hooks:
                hook.remove()
        if missed := [name for name in names if name not in reached]:
            raise InputError(f"calibration: the data never reach layer {missed[0]!r}; leave it out (layers=...)")

    def _begin(self, number: int) -> Within | None:
        """Where the reading of batch `number` begins; None at the start."""
        return None


@dataclass(frozen=True)
class _Onward(Calibration):
    """See `Calibration.onward`. streams: for each batch a block's number and what it was given, [B, T, D]."""

    streams: dict[int, Within] = field(default_factory=dict, repr=False, compare=False)

    def onward(self) -> Calibration:
        """Itself: what was read is kept."""
        return self

    def _begin(self, number: int) -> Within | None:
        return self.streams.get(number)

    def _read(self, model: Any, names: Sequence[str], add: Callable[[str, Tensor], None]) -> None:
        numbers = _block_numbers(model, names)
        first = min(numbers) if numbers else 0
        if not numbers or any(each.begin > first for each in self.streams.values()):
            self.streams.clear()  # it is asked for what lies before
        if not numbers:
            super()._read(model, names, add)
            return
        seen: list[Within] = []
        hook = model.blocks[first].register_forward_pre_hook(
            lambda module, given: seen.append(Within(stream=given[0], begin=first))
        )
        try:
            super()._read(model, names, add)
        finally:
            hook.remove()
        self.streams.clear()
        if sum(each.stream.nbytes for each in seen if each.stream is not None) <= AT_ONCE:
            self.streams.update(enumerate(seen))


class _Enough(Exception):
    """What is still to be computed is not asked for."""


def _stop(module: Any, given: Any) -> None:
    raise _Enough


def _first_above(model: Any, names: Sequence[str]) -> Any:
    """The block that is read after the last of the layers, from which on nothing is asked for; None where all is."""
    numbers = _block_numbers(model, names, alone=False)
    if not numbers:
        return None
    above = 1 + max(numbers)
    return model.blocks[above] if above < len(model.blocks) else None


def _block_numbers(model: Any, names: Sequence[str], alone: bool = True) -> list[int]:
    """The numbers of the layers' blocks, where the model reads its blocks once, in order; else none.

    alone: and none where a block reads more than the stream, such as another's keys, or tokens leave it early.
    """
    numbers = [re.match(r"blocks\.(\d+)\.", name) for name in names]
    spec: Any = getattr(model, "spec", None)
    if not all(numbers) or getattr(spec, "loops", 0) != 1 or (alone and spec.exit is not None):
        return []
    if any(layer.share or (alone and layer.kv != "own") for layer in spec.pattern()):
        return []
    return [int(number[1]) for number in numbers if number]


def _groups(model: Any, names: Sequence[str]) -> Iterator[list[str]]:
    """The names in as few groups as keep their moments within `AT_ONCE` bytes."""
    group: list[str] = []
    size = 0
    for name in names:
        own = 8 * int(model.get_submodule(name).in_features) ** 2
        if group and size + own > AT_ONCE:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    if group:
        yield group


def _next_token_loss(prediction: Tensor, prompt: Prompt) -> Tensor:
    """The mean cross-entropy of predictions [B, T, V] in nats, a scalar."""
    return F.cross_entropy(wide(prediction).flatten(0, 1), prompt.targets.flatten())
