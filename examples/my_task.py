"""A task of one's own with the learner that solves it: a hidden shift of the alphabet, shown by examples."""

from dataclasses import dataclass
from math import log

import torch
from pydantic import PositiveInt

from contextlab import Learner, Prompt, register
from contextlab.tasks.base import TokenTask


@register("learner", "shift_reader", cases=({"vocabulary": 16},))
@dataclass(frozen=True)
class ShiftReader(Learner):
    """Reads the shift off the first pair and adds it to every later symbol: exact.

    vocabulary: number of symbols.
    """

    vocabulary: PositiveInt

    def __call__(self, prompt):
        shift = prompt.inputs[:, 1:2] - prompt.inputs[:, :1]
        answer = (prompt.inputs + shift) % self.vocabulary
        logits = 20.0 * torch.nn.functional.one_hot(answer, self.vocabulary)
        return logits * (prompt.shot > 0)[..., None]  # before the first pair all symbols are as likely


@register("task", "hidden_shift", cases=({}, {"vocabulary": 5, "pairs": 3}))
@dataclass(frozen=True)
class HiddenShift(TokenTask):
    """Pairs x, x + s modulo the vocabulary, with one hidden shift s for each prompt; at each x its x + s is asked.

    vocabulary: number of symbols.
    pairs: pairs in a prompt.
    """

    vocabulary: PositiveInt = 16
    pairs: PositiveInt = 12

    @property
    def input_size(self):
        return self.vocabulary

    def sample(self, batch, generator, device="cpu"):
        drawn = torch.randint(self.vocabulary, (batch, self.pairs + 1), generator=generator, device=device)
        x, y = drawn[:, 1:], (drawn[:, 1:] + drawn[:, :1]) % self.vocabulary  # the first draw is the shift
        inputs, targets = torch.stack([x, y], -1).flatten(1), torch.stack([y, y], -1).flatten(1)
        at = torch.arange(2 * self.pairs, device=device).expand(batch, -1)
        return Prompt(inputs, targets, scored=at % 2 == 0, shot=(at + 1) // 2)

    def learners(self):
        return {"shift_reader": ShiftReader(self.vocabulary)}

    def splits(self):
        return {"train": self, "longer": self.replace(pairs=2 * self.pairs)}

    def chance(self):
        return {"accuracy": 1 / self.vocabulary, "cross_entropy": log(self.vocabulary)}
