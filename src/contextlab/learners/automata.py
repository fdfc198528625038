"""Learners of languages: filters of automata and of hidden Markov models, Baum-Welch, exact programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.learners.answers import SMOOTHING, sure_of
from contextlab.learners.text import token_ids
from contextlab.prompt import Learner, Prompt
from contextlab.registry import register

FORBIDDEN = -1
"""In a table of next states: the automaton has no such edge."""


@register("learner", "automata_posterior", family="languages", papers=("2401.12973",), cases=())
@dataclass(frozen=True, eq=False)
class AutomataPosterior(Learner):
    """The exact Bayes mixture over a finite pool of automata, all equally likely a priori.

    Optimal where the automaton comes from the pool. See `contextlab.tasks.automata` for what an automaton is
    and how strings end.

    automata: next states [N, states, symbols] int64; -1 where there is no edge. Strings start in state 0.
    string_length: the greatest length of a string; lengths are uniform from 1. None: only symbols are predicted,
        as if every string went on.
    doubt: probability, at each token, of a token drawn uniformly instead; then the automaton stays where it is if
        it has no such edge. Keeps the posterior defined where no automaton of the pool can have drawn the prompt.
    """

    automata: Tensor
    string_length: PositiveInt | None
    doubt: PositiveFloat = SMOOTHING

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, symbols + 1] of the next token; the last id ends the string."""
        tokens = token_ids(prompt, self.automata.shape[-1] + 1, "automata_posterior")
        automata = self.automata.to(tokens.device)
        members, states, symbols = automata.shape
        rows = (torch.arange(members, device=tokens.device) * states).expand(len(tokens), -1)
        return _follow(automata.view(-1, symbols), rows, tokens, self.string_length, self.doubt)


@register("learner", "automaton_oracle", family="languages", papers=("2401.12973",), cases=({"string_length": 32},))
@dataclass(frozen=True)
class AutomatonOracle(Learner):
    """The filter of the automaton that drew the prompt, read from `prompt.hidden`: an oracle, not a learner.

    string_length: the greatest length of a string; lengths are uniform from 1. None: only symbols are predicted,
        as if every string went on.
    """

    string_length: PositiveInt | None

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, symbols + 1]. Raises InputError for a prompt that hides no automaton."""
        if prompt.hidden is None or "automaton" not in prompt.hidden:
            raise InputError("automaton_oracle needs a prompt that hides its automaton, such as random_automata draws")
        automata = prompt.hidden["automaton"]
        batch, states, symbols = automata.shape
        tokens = token_ids(prompt, symbols + 1, "automaton_oracle")
        rows = (torch.arange(batch, device=tokens.device) * states).unsqueeze(1)
        return _follow(automata.reshape(-1, symbols), rows, tokens, self.string_length, SMOOTHING)


def _follow(table: Tensor, rows: Tensor, tokens: Tensor, string_length: int | None, doubt: float) -> Tensor:
    """Next-token log-probabilities of a mixture of automata, [B, T, V + 1] float32.

    table: next states [R, V] of all automata, one below the other. rows: [B, N], where in the table each
    prompt's automata begin.
    """
    symbols, vocabulary = table.shape[1], table.shape[1] + 1
    allowed = (table != FORBIDDEN).double()
    step = allowed / allowed.sum(1, keepdim=True).clamp(min=1)
    state, log_weight = torch.zeros_like(rows), torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
    place = torch.zeros(len(tokens), dtype=torch.int64, device=rows.device)
    out = []
    for token in tokens.unbind(1):
        ends = token == symbols
        at, symbol = rows + state, token.clamp(max=symbols - 1).unsqueeze(1)
        after, likelihood = table[at, symbol], step[at, symbol]
        # The chance that a string ends here is the same for all automata and leaves the posterior alone.
        log_weight = log_weight + torch.where(
            ends.unsqueeze(1), 0.0, ((1 - doubt) * likelihood + doubt / vocabulary).log()
        )
        state = torch.where(ends.unsqueeze(1), 0, torch.where(after == FORBIDDEN, state, after))
        place = torch.where(ends, 0, place + 1)
        weight = log_weight.softmax(1)
        following = F.embedding_bag(rows + state, step, per_sample_weights=weight, mode="sum")
        if string_length is None:
            ending = following.new_zeros(len(tokens), 1)
        else:
            ending = torch.where(place > 0, 1 / (string_length - place + 1).clamp(min=1), 0.0).unsqueeze(1)
        out.append(torch.cat([(1 - ending) * following, ending], 1))
    return ((1 - doubt) * torch.stack(out, 1) + doubt / vocabulary).log().float()


@register("learner", "hmm_posterior", family="languages", papers=("2111.02080",), cases=())
@dataclass(frozen=True, eq=False)
class HMMPosterior(Learner):
    """The exact Bayes mixture over hidden Markov models: a forward filter in each, and the posterior over them.

    Optimal where the prompt comes from one of them, all equally likely a priori.

    start: distribution of the first hidden state, [M, K, S]: K possible starts for each of the M chains.
    transition: [M, S, S], from row to column.
    emission: [M, S, V].
    period: the chain starts anew after every `period` tokens, the last of which is a separator that no chain
        emits; None for one chain throughout. All periods of a prompt have the same start (of the K).
    separator: id of the separator.
    doubt: probability, at each token, of a token drawn uniformly instead; 0 if every prompt is possible.
    """

    start: Tensor
    transition: Tensor
    emission: Tensor
    period: PositiveInt | None = None
    separator: NonNegativeInt = 0
    doubt: NonNegativeFloat = SMOOTHING

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, V] of the next token, float32."""
        vocabulary = self.emission.shape[-1]
        tokens = token_ids(prompt, vocabulary, "hmm_posterior")
        start, transition, emission = (
            x.to(tokens.device, torch.float64) for x in (self.start, self.transition, self.emission)
        )
        emission = (1 - self.doubt) * emission + self.doubt / vocabulary
        models, starts, _ = start.shape
        seen = emission.permute(2, 0, 1)  # [V, M, S]
        fresh = start.unsqueeze(1).expand(-1, len(tokens), -1, -1)  # [M, B, K, S]
        ahead, log_weight = fresh, start.new_zeros(models, len(tokens), starts)
        last = F.one_hot(torch.tensor(self.separator), vocabulary).to(emission).expand(len(tokens), -1)
        out = []
        for t, token in enumerate(tokens.unbind(1)):
            if self.period is not None and (t + 1) % self.period == 0:
                ahead = fresh
            else:
                here = ahead * seen[token].transpose(0, 1).unsqueeze(2)
                total = here.sum(-1, keepdim=True)
                log_weight = log_weight + total.squeeze(-1).log()
                here = here / total.clamp(min=torch.finfo(total.dtype).tiny)
                ahead = (here.flatten(1, 2) @ transition).view(here.shape)
            if self.period is not None and (t + 2) % self.period == 0:
                out.append((1 - SMOOTHING) * last + SMOOTHING / vocabulary)
                continue
            weight = log_weight.transpose(0, 1).flatten(1).softmax(1).view(len(tokens), models, starts)
            mixed = torch.einsum("bmk,mbks->mbs", weight, ahead)
            out.append((mixed @ emission).sum(0))
        return torch.stack(out, 1).clamp(min=torch.finfo(torch.float32).tiny).log().float()


@register("learner", "baum_welch", family="languages", papers=("2401.12973",), cases=({"vocabulary": 19},))
@dataclass(frozen=True)
class BaumWelch(Learner):
    """A hidden Markov model fitted to the prompt so far by expectation maximisation (Baum-Welch).

    The model is fitted anew to the first `every`, 2 * `every`, ... tokens, all prefixes of all prompts at once,
    from the same random parameters; the tokens after a prefix are predicted by its model's forward filter until
    the next fit. Before the first fit the prediction is uniform.

    vocabulary: number of token ids.
    states: hidden states.
    iterations: of expectation maximisation.
    every: tokens between fits.
    smoothing: added to every expected count, so that what was not seen keeps some probability.
    seed: of the parameters that each fit starts from.
    """

    vocabulary: PositiveInt
    states: PositiveInt = 16
    iterations: PositiveInt = 20
    every: PositiveInt = 32
    smoothing: PositiveFloat = 0.02
    seed: NonNegativeInt = 0

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, vocabulary] of the next token, float32."""
        tokens = token_ids(prompt, self.vocabulary, "baum_welch")
        batch, length = tokens.shape
        ends = self.every * torch.arange(1, length // self.every + 1, device=tokens.device)
        out = torch.full((batch, length, self.vocabulary), -math.log(self.vocabulary), device=tokens.device)
        if len(ends) == 0:
            return out
        copies = tokens.repeat_interleave(len(ends), 0)
        start, transition, emission = self.fit(copies, ends.repeat(batch))
        forward, _ = _forward(start, transition, emission, copies)
        following = ((forward @ transition) @ emission).log().float()
        following = following.view(batch, len(ends), length, self.vocabulary)
        for i, end in enumerate(ends.tolist()):
            place = slice(end - 1, min(end - 1 + self.every, length))
            out[:, place] = following[:, i, place]
        return out

    def fit(self, tokens: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Start [B, S], transition [B, S, S] and emission [B, S, V] fitted to the first ends[b] of tokens [B, T]."""
        generator = torch.Generator().manual_seed(self.seed)

        def rows(*shape: int) -> Tensor:
            drawn = -torch.log1p(-torch.rand(shape, generator=generator, dtype=torch.float64))
            return (drawn / drawn.sum(-1, keepdim=True)).to(tokens.device).expand(len(tokens), *shape)

        start, transition = rows(self.states), rows(self.states, self.states)
        emission = rows(self.states, self.vocabulary)
        inside = torch.arange(tokens.shape[1], device=tokens.device) < ends.unsqueeze(1)
        shown = F.one_hot(tokens, self.vocabulary).double()
        for _ in range(self.iterations):
            forward, scale = _forward(start, transition, emission, tokens)
            backward = _backward(transition, emission, tokens, scale, inside)
            gamma = forward * backward * inside.unsqueeze(-1)
            gamma = gamma / gamma.sum(-1, keepdim=True).clamp(min=torch.finfo(gamma.dtype).tiny)
            # what the step from t to t + 1 sees there, for steps inside the prefix
            arriving = _emitted(emission, tokens[:, 1:]) * backward[:, 1:] / scale[:, 1:].unsqueeze(-1)
            arriving = arriving * inside[:, 1:].unsqueeze(-1)
            moves = transition * (forward[:, :-1].transpose(1, 2) @ arriving)
            start = _normal(gamma[:, 0] + self.smoothing)
            transition = _normal(moves + self.smoothing)
            emission = _normal(gamma.transpose(1, 2) @ shown + self.smoothing)
        return start, transition, emission


def _emitted(emission: Tensor, tokens: Tensor) -> Tensor:
    """P(token | state), [B, T, S], from emission [B, S, V] and tokens [B, T]."""
    return emission.transpose(1, 2).gather(1, tokens.unsqueeze(-1).expand(-1, -1, emission.shape[1]))


def _forward(start: Tensor, transition: Tensor, emission: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The filter P(state at t | tokens to t) [B, T, S], and P(token t | tokens before) [B, T]."""
    seen, ahead = _emitted(emission, tokens), start
    states, scales = [], []
    for t in range(tokens.shape[1]):
        here = ahead * seen[:, t]
        scale = here.sum(-1, keepdim=True)
        here = here / scale
        ahead = torch.bmm(here.unsqueeze(1), transition).squeeze(1)
        states.append(here)
        scales.append(scale)
    return torch.stack(states, 1), torch.cat(scales, 1)


def _backward(transition: Tensor, emission: Tensor, tokens: Tensor, scale: Tensor, inside: Tensor) -> Tensor:
    """P(tokens after t, to the prefix's end | state at t), scaled as the filter is, [B, T, S]."""
    seen, length = _emitted(emission, tokens), tokens.shape[1]
    later = torch.ones_like(seen[:, 0])
    out = [later]
    for t in range(length - 2, -1, -1):
        earlier = torch.bmm(transition, (seen[:, t + 1] * later / scale[:, t + 1 : t + 2]).unsqueeze(-1)).squeeze(-1)
        later = torch.where(inside[:, t + 1 : t + 2], earlier, 1.0)
        out.append(later)
    return torch.stack(out[::-1], 1)


def _normal(counts: Tensor) -> Tensor:
    return counts / counts.sum(-1, keepdim=True)


@register("learner", "program", family="languages", cases=())
@dataclass(frozen=True, eq=False)
class Program(Learner):
    """An exact program: what it answers has all the probability but a millionth.

    answers: from token ids [B, T] to the answer at each position, [B, T]; any answer where none is asked for. An
        answer may depend on the tokens up to its position only.
    vocabulary: number of token ids that can be predicted.
    """

    answers: Callable[[Tensor], Tensor]
    vocabulary: PositiveInt

    def __call__(self, prompt: Prompt) -> Tensor:
        """Log-probabilities [B, T, vocabulary], float32. Raises InputError for prompts that the program cannot read."""
        tokens = token_ids(prompt, self.vocabulary, "program")
        refusal = "program cannot read this prompt; it needs prompts of the task that it solves"
        try:
            answers = self.answers(tokens)
        except (IndexError, RuntimeError) as error:  # a number that it reads as a place, say, is none
            if isinstance(error, RuntimeError) and "out of bounds" not in str(error):
                raise
            raise InputError(refusal) from error
        if answers.numel() and not 0 <= int(answers.min()) <= int(answers.max()) < self.vocabulary:
            raise InputError(refusal)
        return sure_of(answers, None, self.vocabulary)
