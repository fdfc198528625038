"""Languages in context: many strings of one random probabilistic automaton, then the next token of one more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from contextlab.errors import InputError, at_most
from contextlab.learners.answers import SMOOTHING
from contextlab.learners.automata import FORBIDDEN, AutomataPosterior, AutomatonOracle, BaumWelch
from contextlab.learners.ngrams import BackoffNgram
from contextlab.learners.text import ContextNgram
from contextlab.prompt import Learner, Prompt, Task, wide
from contextlab.registry import register
from contextlab.tasks.base import TokenTask
from contextlab.tasks.corrupting import exchange_answers, exchanged


@register(
    "task",
    "random_automata",
    family="languages",
    papers=("2401.12973",),
    cases=(
        {"vocabulary": 6, "states": 4, "edges": 2, "string_length": 8, "length": 64, "pool": 20},
        {"vocabulary": 5, "states": 3, "edges": 2, "string_length": 6, "length": 64, "pool": None},
    ),
)
@dataclass(frozen=True)
class RandomAutomata(TokenTask):
    """In-context language learning: strings of one random automaton, separated; predict each next token (2401.12973).

    An automaton has `fewest_states` to `states` states and an alphabet of so many of the symbols. Each state has
    1 to `edges` edges, with different symbols, to different states other than itself; a string starts in state
    0 and takes each edge of its state with equal probability. Lengths of strings are uniform from 1 to
    `string_length`; after each comes the separator (id `vocabulary`), which also begins the prompt. The last
    string may be cut. `shot` is the number of whole strings seen.

    As in the paper's public code are how edges, alphabet and lengths are drawn, the start and the walk. That code has
    `states` 12, `fewest_states` 4, `edges` 3, `string_length` 49 and `separators` False: the recipe `regbench` has
    them, too; the defaults here are others. There a prompt has 10 to 19 strings, here a fixed number of tokens;
    and automata of the train and test parts of a pool differ as languages here, not only as tables.

    vocabulary: number of symbols that strings are made of.
    states: most states of an automaton.
    fewest_states: fewest states of an automaton; None for half of `states`, but enough for its edges.
    edges: most edges that leave a state.
    string_length: the greatest length of a string.
    length: tokens in the prompt.
    separators: the ends of strings are scored; otherwise only the predictions of symbols are, in the loss, too.
    pool: automata come from a pool of so many; None for a fresh one in each prompt.
    pool_seed: of the pool.
    part: "train", or "test" for as many other automata, none of which has the language of one in the train part.
    """

    metric: ClassVar[str] = "cross_entropy"
    higher_is_better: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "easy": {"vocabulary": 8, "states": 5, "edges": 2, "string_length": 12, "length": 128, "pool": 100},
        "hard": {"string_length": 50, "length": 512, "pool": 5000},
    }

    vocabulary: PositiveInt = 18
    states: PositiveInt = 12
    fewest_states: PositiveInt | None = None
    edges: PositiveInt = 4
    string_length: PositiveInt = 32
    length: PositiveInt = 256
    separators: bool = True
    pool: PositiveInt | None = 1000
    pool_seed: NonNegativeInt = 0
    part: Literal["train", "test"] = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edges > self.states - 1:
            raise InputError(
                f"edges {self.edges} do not fit: they lead to different other states, and there are {self.states} "
                f"states; " + at_most(self.states - 1, f"use states {self.edges + 1} or more")
            )
        if self.fewest_states is not None and not self.edges < self.fewest_states <= self.states:
            raise InputError(
                f"fewest_states {self.fewest_states} is out of range: {self.edges} edges need {self.edges + 1} to "
                f"{self.states}"
            )
        if self.least > self.vocabulary:
            raise InputError(
                f"vocabulary {self.vocabulary} is too small: an alphabet has at least as many symbols as the fewest "
                f"states, {self.least}; use at least {self.least}"
            )
        if self.part == "test" and self.pool is None:
            raise InputError("part 'test' needs a pool; without one, every automaton is new: use part 'train'")

    @property
    def least(self) -> int:
        """Fewest states of an automaton, and fewest symbols in its alphabet."""
        return max(self.states // 2, self.edges + 1) if self.fewest_states is None else self.fewest_states

    @property
    def input_size(self) -> int:
        return self.vocabulary + 1

    def symbol(self, token: int) -> str:
        """Letters where there are at most 26 symbols; the separator as |."""
        if token == self.vocabulary:
            return "|"
        return chr(ord("a") + token) if self.vocabulary <= 26 else str(token)

    def words(self, prompt: Prompt, row: int = 0) -> str:
        """The strings, one after another, a line each."""
        text = " ".join(self.symbol(token) for token in prompt.inputs[row].tolist())
        return "\n".join(line.strip() for line in text.split("|")[1:])

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts; `hidden` has the automata, next states [batch, states, vocabulary], -1 for no edge."""
        if self.pool is None:
            automata = draw_automata(self, batch, generator, device)
        else:
            chosen = torch.randint(self.pool, (batch,), generator=generator, device=device)
            automata = pool_of(self, str(device))[chosen]
        tokens = self._walk(automata, generator)
        return Prompt(
            tokens[:, :-1],
            tokens[:, 1:],
            torch.ones_like(tokens[:, 1:], dtype=torch.bool) if self.separators else tokens[:, 1:] != self.vocabulary,
            (tokens[:, :-1] == self.vocabulary).cumsum(1) - 1,
            hidden={"automaton": automata},
        )

    def _walk(self, automata: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens [B, length + 1], separator first."""
        batch, states, symbols = automata.shape
        allowed = automata != FORBIDDEN
        # the symbols of each state's edges in front, and where they lead
        symbol = allowed.int().argsort(dim=2, descending=True, stable=True)[..., : self.edges]
        after = automata.gather(2, symbol).flatten()
        symbol = symbol.flatten()
        degree = allowed.sum(2).flatten()
        uniform = torch.rand(2, self.length, batch, generator=generator, device=automata.device)
        first = torch.arange(batch, device=automata.device) * states
        state, place = first, torch.zeros_like(first)
        tokens = [torch.full_like(first, symbols)]
        for for_end, for_edge in zip(*uniform.unbind(0), strict=True):
            ends = (place > 0) & (for_end * (self.string_length - place + 1) < 1)
            edges = degree[state]
            edge = state * self.edges + (for_edge * edges).long().minimum(edges - 1)
            tokens.append(torch.where(ends, symbols, symbol[edge]))
            state = torch.where(ends, first, first + after[edge])
            place = torch.where(ends, 0, place + 1)
        return torch.stack(tokens, 1)

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        """The strings of the automaton in which two symbols have changed their roles; it need not be of the pool."""
        made, one, other = exchange_answers(prompt, generator, 0, self.vocabulary)
        assert prompt.hidden is not None
        automata = prompt.hidden["automaton"]
        symbols = torch.arange(self.vocabulary, device=one.device).expand(len(one), -1)
        name = exchanged(symbols, one, other).unsqueeze(1).expand_as(automata)
        return replace(made, hidden={"automaton": automata.gather(2, name)})

    def learners(self) -> dict[str, Learner]:
        """The exact posterior over the pool where it is the prompts' own; n-grams and Baum-Welch; the oracle.

        Without a pool, and on the test part, nothing better is known that can be computed than an interpolated
        n-gram of the context. On the test part `train_posterior` shows how far a predictor gets that has memorized the
        train part and knows nothing else.
        """
        size = self.input_size
        counting: dict[str, Learner] = {
            "kneser_ney": ContextNgram(size, order=3, discount=0.75),
            "bigram": BackoffNgram(size, order=2),
            "baum_welch": BaumWelch(size, states=self.states, every=min(32, self.length)),
        }
        oracle = {"automaton_oracle": self._oracle}
        if self.pool is None:
            return {**counting, **oracle}
        train = AutomataPosterior(pool_of(self.replace(part="train"), "cpu"), self._ends)
        if self.part == "train":
            return {"automata_posterior": train, **counting, **oracle}
        return {**counting, "train_posterior": train, **oracle}

    def splits(self) -> dict[str, Task]:
        """'train', 'new automata' where there is a pool, then twice the tokens."""
        found: dict[str, Task] = {"train": self}
        if self.pool is not None and self.part == "train":
            found["new automata"] = self.replace(part="test")
        return {**found, f"length={2 * self.length}": self.replace(length=2 * self.length)}

    @property
    def _ends(self) -> int | None:
        """The string_length of learners: where no end is scored, they predict none."""
        return self.string_length if self.separators else None

    @property
    def _oracle(self) -> AutomatonOracle:
        return AutomatonOracle(self._ends)

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """cross_entropy in nats; accuracy and allowed_accuracy; total_variation from the automaton's own distribution.

        accuracy is 1 where the largest logit is that of the token that came (an exact match), allowed_accuracy where
        it is that of one that may come; the separator may come where it is scored and the string may end. With
        `separators` False, allowed_accuracy is what the paper calls accuracy.
        """
        truth = self._oracle(prompt).exp()
        away = (wide(prediction).softmax(-1) - truth).abs().sum(-1) / 2
        chosen = truth.gather(-1, prediction.argmax(-1, keepdim=True)).squeeze(-1)
        # what may not come has only its share of the doubt that the oracle spreads over all tokens
        allowed = (chosen > 1.001 * SMOOTHING / self.input_size).float()
        found = {**super().errors(prediction, prompt), "allowed_accuracy": allowed, "total_variation": away}
        return found if self.separators else {"allowed_accuracy": allowed, **found}  # reports judge by the first

    def chance(self) -> Mapping[str, float]:
        """Guessing uniformly among all tokens."""
        return {"cross_entropy": math.log(self.input_size)}


def draw_automata(task: RandomAutomata, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """Next states [count, states, vocabulary] int64 of random automata; -1 where there is no edge."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, device=device)

    states, symbols, edges = task.states, task.vocabulary, task.edges
    sizes = task.least + (rand(1) * (states - task.least + 1)).long().clamp(max=states - task.least)
    letters = task.least + (rand(1) * (symbols - task.least + 1)).long().clamp(max=symbols - task.least)
    in_alphabet = rand(symbols).argsort(1).argsort(1) < letters
    symbol = (rand(states, symbols) * in_alphabet.unsqueeze(1)).topk(edges, 2).indices
    there = torch.arange(states, device=device)
    possible = (there < sizes).unsqueeze(1) & (there != there.unsqueeze(1))
    # 1 is added so that no possible state ties with an impossible one
    after = ((rand(states, states) + 1) * possible).topk(edges, 2).indices
    degree = 1 + (rand(states, 1) * edges).long().clamp(max=edges - 1)
    after = torch.where(torch.arange(edges, device=device) < degree, after, FORBIDDEN)
    automata = torch.full((count, states, symbols), FORBIDDEN, device=device).scatter_(2, symbol, after)
    return torch.where((there < sizes).unsqueeze(-1), automata, FORBIDDEN)


def fingerprint(automata: Tensor) -> Tensor:
    """A number for each automaton [N] int64; automata with the same language have the same number.

    States are told apart by what can follow them, in as many rounds as two automata have states together: a
    hash of the symbols that leave a state and of the hashes of where they lead.
    """
    count, states, symbols = automata.shape
    generator = torch.Generator().manual_seed(0)
    factor = torch.randint(1, 2**62, (symbols,), generator=generator).to(automata.device) * 2 + 1
    allowed, after = automata != FORBIDDEN, automata.clamp(min=0)
    known = torch.zeros(count, states, dtype=torch.int64, device=automata.device)
    for _ in range(2 * states):
        met = known.gather(1, after.flatten(1)).view(after.shape)
        # int64 wraps around, which is what a multiplicative hash wants; the shift brings high bits down
        mixed = ((met + 1) * factor * 0x9E3779B97F4A7C1) ^ ((met + 1) * factor >> 29)
        known = (mixed * factor * allowed).sum(2)
        known = known ^ (known >> 31)
    return known[:, 0]


@lru_cache(maxsize=16)
def _pools(task: RandomAutomata) -> tuple[Tensor, Tensor]:
    """The train and the test part of a pool, drawn on the CPU so that they do not depend on the device."""
    assert task.pool is not None
    generator = torch.Generator().manual_seed(task.pool_seed)
    wanted, seen, kept = 2 * task.pool, set[int](), list[Tensor]()
    for _ in range(20):
        drawn = draw_automata(task, wanted, generator, "cpu")
        for number, automaton in zip(fingerprint(drawn).tolist(), drawn, strict=True):
            if number not in seen and len(kept) < wanted:
                seen.add(number)
                kept.append(automaton)
        if len(kept) == wanted:
            both = torch.stack(kept)
            return both[: task.pool], both[task.pool :]
    raise InputError(
        f"pool {task.pool} is too large: about {len(kept)} different languages have so few states and "
        f"symbols, and the train and test parts need {wanted}; at most {len(kept) // 2}"
    )


@lru_cache(maxsize=16)
def pool_of(task: RandomAutomata, device: str) -> Tensor:
    """The automata of the task's part of its pool, [pool, states, vocabulary]."""
    # options that do not shape the pool are set alike, so that tasks which share a pool share the work
    train, test = _pools(task.replace(part="train", length=1, string_length=1, separators=True))
    return (train if task.part == "train" else test).to(device)
