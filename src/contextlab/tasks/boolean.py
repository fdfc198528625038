"""Boolean functions in context: a new function of a named class for each prompt."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.learners.boolean import nearest_before
from contextlab.prompt import Learner, Prompt, Task
from contextlab.registry import register
from contextlab.tasks.base import Drawn, LabelTask, lay_out
from contextlab.tasks.boolean_learners import BOUND, FORMULAS, PARITIES, learners_of
from contextlab.tasks.corrupting import chosen_of

Function = Literal[
    "conjunction",
    "disjunction",
    "sparse_disjunction",
    "cnf",
    "dnf",
    "majority",
    "sparse_majority",
    "sparse_threshold",
    "integer_halfspace",
    "parity",
    "sparse_parity",
    "nearest_neighbour",
]
Share = Annotated[float, Field(ge=0, lt=1)]

SPARSE = {"sparse_disjunction": 4, "sparse_majority": 3, "sparse_parity": 2}
APPLIES = {
    "relevant": tuple(SPARSE),
    "held_out": tuple(SPARSE),
    "unseen": tuple(SPARSE),
    "pool_seed": tuple(SPARSE),
    "terms": ("cnf", "dnf"),
    "negations": ("conjunction", "disjunction", "cnf", "dnf"),
    "planted": FORMULAS,
    "teaching": (*FORMULAS, *PARITIES),
    "start": ("nearest_neighbour",),
}
"""Option -> the functions that have it."""
TRIES = 64
"""Functions that are drawn to find one that labels an input otherwise."""
MOST_POOL = 100_000
"""Functions of a class that are listed at most, to hold some out."""


@register(
    "task",
    "boolean_function",
    family="boolean",
    papers=("2310.03016",),
    cases=(
        {"dimensions": 6, "examples": 16},
        {"function": "disjunction", "dimensions": 12, "examples": 16, "noise": 0.1},
        {"function": "sparse_disjunction", "dimensions": 10, "examples": 16, "held_out": 0.5},
        {"function": "conjunction", "dimensions": 10, "examples": 16, "teaching": True},
        {"function": "cnf", "dimensions": 10, "examples": 24},
        {"function": "dnf", "dimensions": 10, "examples": 24, "teaching": True, "negations": False},
        {"function": "majority", "dimensions": 16, "examples": 16},
        {"function": "sparse_majority", "dimensions": 10, "examples": 16, "layout": "interleaved"},
        {"function": "sparse_threshold", "dimensions": 10, "examples": 16},
        {"function": "integer_halfspace", "dimensions": 10, "examples": 16},
        {"function": "parity", "dimensions": 6, "examples": 16},
        {"function": "parity", "dimensions": 6, "examples": 16, "teaching": True},
        {"function": "sparse_parity", "dimensions": 10, "examples": 16, "noise": 0.1},
        {"function": "sparse_parity", "dimensions": 10, "examples": 16, "teaching": True},
        {"function": "nearest_neighbour", "dimensions": 10, "examples": 24, "start": 8},
    ),
)
@dataclass(frozen=True)
class BooleanFunctions(LabelTask):
    """Boolean functions of inputs in {-1, +1}^d with labels -1, +1, each prompt its own (2310.03016).

    Classes and inputs are those of the paper's code. In formulas a variable is a literal of a term with chance 0.3
    (conjunction, disjunction) or 0.2 (the terms of dnf, the clauses of cnf), plain or negated evenly; a
    sparse_disjunction has `relevant` plain literals. So that labels are not all alike, a share of the inputs is made
    to satisfy the conjunction or one term of the dnf, to falsify the disjunction or one clause of the cnf (the same
    in the whole prompt). A majority is true where w . x > 1/2, with each w = 1 with chance 0.3, else 0; an
    integer_halfspace has w in -3 .. 3; a sparse_threshold has w = 1 or -1, each with chance 0.15, and the threshold
    -2.5, -1.5, ..., 2.5. A parity is true where an odd number of the relevant x is +1, each relevant with chance 1/2.
    In nearest_neighbour the first `start` labels are random (either with probability 1/2), later ones those of the
    nearest example before (the earliest of several; equal inputs have equal labels); only later ones are scored.

    Beside the code: sparse_majority, teaching sequences of disjunctions and cnf (mirror images), of negated terms in
    dnf and of parities; flips come in the order of the variables, and a sequence is cut where the prompt ends.

    function: the class.
    noise: probability that a label is flipped (in the context and as a target).
    relevant: variables of sparse functions; None for 4 (disjunction), 3 (majority), 2 (parity).
    terms: of dnf, clauses of cnf.
    negations: literals may be negated; otherwise as many are plain.
    planted: share of inputs made to have the rare label; None for 0.3, 0.35 (dnf), 0.4 (conjunction, disjunction
        with teaching).
    teaching: a teaching sequence comes first: for each term an input that has the term's literals and is -1 elsewhere
        (with negations, a second one that is +1 elsewhere), then this input with each of the literals flipped, one
        after another; all signs mirrored for disjunctions and cnf. It fits one function of the class only, but for
        dnf and cnf with negations or with terms that imply one another. For a parity, inputs with one +1 each: at
        all variables in order, of which no fewer would do, or at the `relevant` ones of a sparse_parity.
    start: examples with labels of their own, in nearest_neighbour.
    held_out: share of the functions of a sparse class that are never drawn, but by the split 'unseen'.
    unseen: draw those instead.
    pool_seed: of the choice of the functions held out.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"dimensions": 8, "examples": 20},
        "hard": {"function": "parity", "dimensions": 20, "examples": 60},
    }

    dimensions: PositiveInt = 28
    function: Function = "conjunction"
    noise: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    relevant: PositiveInt | None = None
    terms: PositiveInt = 3
    negations: bool = True
    planted: Share | None = None
    teaching: bool = False
    start: PositiveInt = 20
    held_out: Share = 0.0
    unseen: bool = False
    pool_seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(self):
            owners = APPLIES.get(field.name)
            if owners and self.function not in owners and getattr(self, field.name) != field.default:
                raise InputError(f"{field.name} is an option of {', '.join(owners)}; leave it out for {self.function}")
        if self.size > self.dimensions:
            raise InputError(f"relevant {self.size} is more than dimensions {self.dimensions}; at most that many")
        if self.function == "nearest_neighbour" and self.noise:
            raise InputError("noise is not defined for nearest_neighbour, which copies labels; use noise 0")
        if self.function == "nearest_neighbour" and self.start >= self.examples:
            raise InputError(
                f"start {self.start} leaves none of {self.examples} examples to score; at most {self.examples - 1}"
            )
        if self.held_out or self.unseen:
            count = math.comb(self.dimensions, self.size)
            if count > MOST_POOL:
                raise InputError(
                    f"held_out needs a list of all functions, and {self.function} with {self.size} of "
                    f"{self.dimensions} "
                    f"variables has {count}; at most {MOST_POOL}"
                )
            if not 0 < round(self.held_out * count) < count:
                raise InputError(
                    f"held_out {self.held_out} of {count} functions leaves none to draw on one side; "
                    f"use {1 / count:.2g} to {1 - 1 / count:.2g}"
                )

    @property
    def size(self) -> int:
        """Relevant variables of a sparse function, 0 for others."""
        return self.relevant or SPARSE.get(self.function, 0)

    @property
    def dual(self) -> bool:
        """Whether the function is the mirror image of a conjunction or a dnf: all signs flipped, labels too."""
        return self.function in ("disjunction", "sparse_disjunction", "cnf")

    @property
    def parts(self) -> int:
        """Terms or clauses."""
        return self.terms if self.function in APPLIES["terms"] else 1

    @property
    def signed(self) -> bool:
        """Whether literals may be negated."""
        return self.negations and self.function in APPLIES["negations"]

    @property
    def share(self) -> float:
        """Inputs made to have the rare label."""
        if self.planted is not None:
            return self.planted
        if self.function == "dnf":
            return 0.35
        return 0.4 if self.teaching and self.function != "cnf" else 0.3

    @property
    def literal(self) -> float:
        """Chance that a variable is in a term."""
        return self.size / self.dimensions if self.size else 0.2 if self.parts > 1 else 0.3

    def draw(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Drawn:
        shape = (batch, self.examples, self.dimensions)
        xs = torch.empty(shape, device=device).random_(0, 2, generator=generator).mul_(2).sub_(1)
        scored = None
        if self.function == "nearest_neighbour":
            ys, hidden = self._copies(xs, generator), None
            scored = (torch.arange(self.examples, device=device) >= self.start).expand(batch, -1)
        else:
            hidden = self._function(batch, generator, device)
            xs = self._inputs(xs, hidden["weights"], generator)
            ys = self._labels(xs, hidden)
        if self.noise:
            ys = ys * torch.where(torch.rand(ys.shape, generator=generator, device=device) < self.noise, -1, 1)
        return Drawn(xs, ys, scored, hidden)

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """Examples of another function of the class that labels the last input otherwise, of `TRIES` that are drawn.

        Of formulas half of those are made to agree with the input. Other inputs are drawn anew where the function says
        what is planted or taught. In nearest_neighbour every label is the other one.
        """
        if self.function == "nearest_neighbour":
            return super().corrupt(prompt, generator)
        assert prompt.xs is not None
        assert prompt.ys is not None
        xs, ys, batch = prompt.xs.float(), prompt.ys.float(), prompt.batch
        asked = xs[:, -1:]
        tried = self._function(TRIES * batch, generator, xs.device)
        if self.function in FORMULAS and not self.size:
            tried["weights"] = self._agreeing(tried["weights"], asked.repeat(TRIES, 1, 1))
        labels = self._labels(asked.repeat(TRIES, 1, 1), tried).view(TRIES, batch).mT
        number, there = chosen_of(labels != ys[:, -1], generator)
        rows = torch.arange(batch, device=xs.device)
        found = {name: each.unflatten(0, (TRIES, batch))[number.squeeze(1), rows] for name, each in tried.items()}
        made = self._inputs(xs, found["weights"], generator)
        made[:, -1:] = asked
        other = self._labels(made, found)
        if self.noise:
            flips = torch.rand(other.shape, generator=generator, device=xs.device) < self.noise
            flips[:, -1] = False
            other = torch.where(flips, -other, other)
        made, other = (torch.where(there.unsqueeze(2), new, old) for new, old in ((made, xs), (other, ys)))
        return lay_out(Drawn(made, other, hidden=found), self.layout).to(prompt.inputs.dtype)

    def _agreeing(self, literals: Tensor, x: Tensor) -> Tensor:
        """Literals [N, terms, d], in the first half of rows with a first term that holds at x [N, 1, d], or clause that
        does not."""
        x = -x[:, 0] if self.dual else x[:, 0]
        first = literals[:, 0]
        agreeing = first.abs() * x if self.signed else torch.where(first == x, first, 0)
        agreeing[len(x) // 2 :] = first[len(x) // 2 :]
        return torch.cat([agreeing.unsqueeze(1), literals[:, 1:]], 1)

    def _function(self, batch: int, generator: torch.Generator, device: torch.device | str) -> dict[str, Tensor]:
        """What defines a function for each prompt."""
        if self.function in FORMULAS:
            return {"weights": self._literals(batch, generator, device)}
        weights, threshold = self._weights(batch, generator, device)
        return {"weights": weights, "threshold": threshold.view(-1, 1).expand(batch, 1)}

    def _inputs(self, xs: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Inputs [B, n, d] with those planted and taught among them."""
        if self.function in FORMULAS:
            return self._planted(xs, weights, generator)
        return self._teach_parity(xs, weights) if self.teaching else xs.clone()

    def _labels(self, xs: Tensor, function: dict[str, Tensor]) -> Tensor:
        """[B, n, 1] of inputs [B, n, d]."""
        weights = function["weights"]
        if self.function in FORMULAS:
            sign = -1 if self.dual else 1
            terms = sign * weights
            holds = xs @ terms.mT >= terms.abs().sum(2).unsqueeze(1)
            return torch.where(holds.any(2, keepdim=True), sign, -sign).to(xs)
        if self.function in PARITIES:
            return (xs > 0).float() @ weights.unsqueeze(2) % 2 * 2 - 1
        return (xs @ weights.unsqueeze(2) - function["threshold"].unsqueeze(2)).sign()

    def _literals(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """[B, terms, d] of -1, 0, 1."""
        if self.size:
            return self._subsets(batch, generator, device).unsqueeze(1)
        uniform = torch.rand(batch, self.parts, self.dimensions, generator=generator, device=device)
        plain = self.literal / 2 if self.signed else self.literal
        return (uniform < plain).float() - ((uniform >= plain) & (uniform < self.literal)).float()

    def _weights(self, batch: int, generator: torch.Generator, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """[B, d], and the threshold [B, 1, 1] or a number as a tensor."""
        half = torch.tensor(0.5, device=device)
        shape = (batch, self.dimensions)
        if self.size:
            return self._subsets(batch, generator, device), half
        if self.function == "integer_halfspace":
            return torch.randint(-BOUND, BOUND + 1, shape, generator=generator, device=device).float(), half
        uniform = torch.rand(shape, generator=generator, device=device)
        if self.function == "sparse_threshold":
            threshold = torch.randint(-BOUND, BOUND, (batch, 1, 1), generator=generator, device=device) + 0.5
            return (uniform < 0.15).float() - (uniform > 0.85).float(), threshold
        return (uniform < (0.5 if self.function == "parity" else 0.3)).float(), half

    def _subsets(self, batch: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """The relevant variables, [B, d] of 0 and 1."""
        if self.held_out:
            pool = _pool(self.dimensions, self.size, self.pool_seed).to(device)
            unseen = round(self.held_out * len(pool))
            pool = pool[:unseen] if self.unseen else pool[unseen:]
            chosen = pool[torch.randint(len(pool), (batch,), generator=generator, device=device)]
        else:
            order = torch.rand(batch, self.dimensions, generator=generator, device=device)
            chosen = order.topk(self.size, dim=1).indices
        return torch.zeros(batch, self.dimensions, device=device).scatter_(1, chosen, 1.0)

    def _planted(self, xs: Tensor, literals: Tensor, generator: torch.Generator) -> Tensor:
        """Inputs of a formula with the planted and taught ones among them."""
        sign = -1 if self.dual else 1
        terms = sign * literals  # a clause is false where the conjunction of its literals' negations is true
        if self.share:
            planted = torch.rand(xs.shape[:2], generator=generator, device=xs.device) < self.share
            chosen = torch.randint(self.parts, (len(xs), 1), generator=generator, device=xs.device)
            term = terms.gather(1, chosen.unsqueeze(2).expand(-1, -1, xs.shape[2]))
            xs = torch.where(planted.unsqueeze(2) & (term != 0), term, xs)
        return self._teach(xs, terms, sign) if self.teaching else xs.clone()

    def _teach(self, xs: Tensor, terms: Tensor, sign: int) -> Tensor:
        """The teaching sequence over the first inputs."""
        heads, used = (2 if self.signed else 1), terms != 0
        stop = (heads + used.sum(2)).cumsum(1)  # where each term's examples end, [B, terms]
        place = torch.arange(xs.shape[1], device=xs.device).expand(len(xs), -1).contiguous()
        part = torch.searchsorted(stop, place, right=True)
        taught = part < self.parts
        part = part.clamp(max=self.parts - 1)
        since = place - (stop - heads - used.sum(2)).gather(1, part)  # which of the term's examples
        rows = part.unsqueeze(2).expand_as(xs)
        term, order = terms.gather(1, rows), used.int().cumsum(2).gather(1, rows)  # literals count from 1
        fill = torch.where(since == 1, sign, -sign) if heads == 2 else torch.full_like(since, -sign)
        shown = torch.where(term != 0, term, fill.unsqueeze(2).to(term))
        turned = (term != 0) & (order == (since - heads + 1).unsqueeze(2))
        return torch.where(taught.unsqueeze(2), torch.where(turned, -shown, shown), xs)

    def _teach_parity(self, xs: Tensor, weights: Tensor) -> Tensor:
        """The teaching sequence over the first inputs: one variable +1 in each, all of them or the relevant ones."""
        used = weights > 0 if self.size else torch.ones_like(weights, dtype=torch.bool)
        place = torch.arange(xs.shape[1], device=xs.device)
        turned = used.unsqueeze(1) & (used.cumsum(1).unsqueeze(1) == place.unsqueeze(1) + 1)
        return torch.where(place.unsqueeze(1) < used.sum(1).view(-1, 1, 1), turned.to(xs) * 2 - 1, xs)

    def _copies(self, xs: Tensor, generator: torch.Generator) -> Tensor:
        """Labels of `nearest_neighbour`, [B, n, 1]."""
        order, nearest = torch.arange(xs.shape[1], device=xs.device), nearest_before(xs)
        same = (xs.gather(1, nearest.unsqueeze(2).expand_as(xs)) == xs).all(2)
        copied = ((order >= self.start) | same) & (order > 0)
        parent = torch.where(copied, nearest, order)
        while not torch.equal(parent, parent.gather(1, parent)):  # to the example whose label it was at first
            parent = parent.gather(1, parent)
        own = torch.randint(0, 2, xs.shape[:2], generator=generator, device=xs.device).float() * 2 - 1
        return own.gather(1, parent).unsqueeze(2)

    def learners(self) -> dict[str, Learner]:
        """The best known first: the exact posterior where the class can be enumerated (the whole class, also where
        some functions are held out), elimination over GF(2) for parities, what reads the teaching sequence; then
        the posterior over formulas drawn from the prior (CNFs and DNFs of up to 10 bits), or that keeps variables alone
        or Gaussian. Of noisy parities that are too many to enumerate no
        fast learner is known, and the neighbours come first."""
        return learners_of(self)

    def splits(self) -> dict[str, Task]:
        """'train'; 'unseen' functions where some are held out; 'even' inputs, none planted; 'noise=0.1'; 'taught' or
        'untaught', with and without the teaching sequence; one more relevant variable; twice the examples."""
        found: dict[str, Task] = {"train": self}
        if self.held_out:
            found["unseen"] = self.replace(unseen=True)
        if self.function in FORMULAS and self.share:
            found["even"] = self.replace(planted=0.0)
        if self.function in APPLIES["teaching"]:
            planted = self.share if self.function in FORMULAS else None
            found["untaught" if self.teaching else "taught"] = self.replace(teaching=not self.teaching, planted=planted)
        if not self.noise and self.function != "nearest_neighbour":
            found["noise=0.1"] = self.replace(noise=0.1)
        if 0 < self.size < self.dimensions:
            found[f"relevant={self.size + 1}"] = self.replace(relevant=self.size + 1, held_out=0.0, unseen=False)
        found[f"examples={2 * self.examples}"] = self.replace(examples=2 * self.examples)
        return found

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The function, where it has a form, then x -> y with a sign for each number; (x -> y) where none is scored."""
        lines = [] if prompt.hidden is None else [self._formula_words({k: v[row] for k, v in prompt.hidden.items()})]
        assert prompt.xs is not None
        assert prompt.ys is not None
        assert prompt.at is not None
        signs = {-1.0: "-", 1.0: "+"}
        scored = prompt.scored[row, prompt.at].tolist()
        for x, (y,), counts in zip(prompt.xs[row].tolist(), prompt.ys[row].tolist(), scored, strict=True):
            line = f"{''.join(signs[value] for value in x)} -> {signs[y]}"
            lines.append(line if counts else f"({line})")
        return "\n".join(lines)

    def _formula_words(self, hidden: dict[str, Tensor]) -> str:
        weights = hidden["weights"]
        if self.function in FORMULAS:
            inner, outer, empty = (" or ", " and ", "false") if self.dual else (" and ", " or ", "true")
            terms = []
            for term in weights.tolist():
                literals = [f"{'not ' if value < 0 else ''}x{i}" for i, value in enumerate(term, 1) if value]
                terms.append(inner.join(literals) or empty)
            return terms[0] if self.parts == 1 else outer.join(f"({term})" for term in terms)
        if self.function in PARITIES:
            return " xor ".join(f"x{i}" for i, value in enumerate(weights.tolist(), 1) if value) or "false"
        parts = [f"{value:+.0f} x{i}".replace("1 ", "") for i, value in enumerate(weights.tolist(), 1) if value]
        return f"{' '.join(parts) or '0'} > {hidden['threshold'].item()}"


@lru_cache(maxsize=8)
def _pool(dimensions: int, relevant: int, seed: int) -> Tensor:
    """All subsets of so many variables in an order by the seed, [C, relevant]."""
    subsets = torch.tensor(list(itertools.combinations(range(dimensions), relevant)))
    return subsets[torch.randperm(len(subsets), generator=torch.Generator().manual_seed(seed))]
