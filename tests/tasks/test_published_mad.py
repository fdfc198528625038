"""The tasks of the suite mad draw as the authors' code does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contextlab.experiments import load_recipe
from contextlab.prompt import Prompt
from tests.tasks.published import Figure, hold

PROMPTS = 2048

MAD: dict[str, Figure] = {
    "recall: scored": (56.001, 0.03825, 2048),
    "recall: different keys": (7.9985, 0.03825, 2048),
    "recall: tokens since the last key": (15.604, 14.49, 2048),
    "noisy_recall: scored": (43.589, 3.244, 2048),
    "noisy_recall: different keys": (7.9922, 0.08806, 2048),
    "noisy_recall: tokens since the last key": (20.184, 19.01, 2048),
    "noisy_recall: share of noise": (0.19557, 0.05113, 2048),
    "fuzzy_recall: padding": (5.3413, 1.385, 2048),
    "fuzzy_recall: tokens of keys": (62.008, 3.702, 2048),
    "fuzzy_recall, longest_keys: padding": (4.9062, 1.524, 2048),
    "fuzzy_recall, longest_keys: tokens of keys": (74.396, 2.749, 2048),
    "fuzzy_recall, longest_keys: scored": (4.4365, 2.363, 2048),
    "memorization: different keys": (15.073, 0.8665, 2048),
    "memorization: scored": (16.0, 0.0, 2048),
    "memorization: mean id of keys": (63.139, 9.011, 2048),
    "compression: different symbols": (13.222, 1.073, 2048),
    "compression: mean id": (6.9649, 0.7669, 2048),
    "selective_copy: first symbol at": (13.983, 3.61, 2048),
    "selective_copy: mean place of symbols": (126.06, 4.41, 2048),
    "selective_copy: last symbol at": (238.0, 0.0, 2048),
    "selective_copy: scored": (16.0, 0.0, 2048),
    "selective_copy: different symbols": (9.7051, 1.191, 2048),
}
"""Of a prompt, by task and split: mean, standard deviation, prompts.

With the generators of mad/data/instances.py of github.com/athms/mad-lab at commit
0f49a452b84ca0d13f8eb9c1ffa649032376fb1b, on the base sizes of configs/tasks, test prompts but for "fuzzy_recall".
"""
RARE = {"recall: scored": 1.0, "recall: different keys": 1.0, "noisy_recall: different keys": 0.7}
"""Where few prompts differ from the others, the standard deviation is known less well."""


def different(tokens: Tensor, wanted: Tensor) -> Tensor:
    """How many different ones there are among the tokens [B, T] that are wanted [B, T], [B]."""
    size = int(tokens.max()) + 1
    return torch.zeros(len(tokens), size).scatter_add_(1, tokens, wanted.float()).bool().sum(1)


def since_last_key(prompt: Prompt) -> Tensor:
    """Tokens between the key at the prompt's end and the same key before it, [B]."""
    keys, places = prompt.inputs[:, ::2], torch.arange(prompt.inputs[:, ::2].shape[1])
    before = torch.where(keys[:, :-1] == keys[:, -1:], places[:-1], -1).amax(1)
    return 2 * (places[-1] - before)


def measured(task: str, split: str, what: str) -> Tensor:
    """One figure of each prompt, [B]."""
    built = load_recipe("mad").build_task(task).splits()[split]
    prompt = built.sample(PROMPTS, torch.Generator().manual_seed(len(task)))
    x, every = prompt.inputs, torch.ones_like(prompt.inputs, dtype=torch.bool)
    keys = {"recall": 8, "noisy_recall": 8, "fuzzy_recall": 7, "memorization": 127}.get(task, 0)
    if task == "selective_copy":
        symbols = x < 14
        at = torch.where(symbols, torch.arange(x.shape[1]), 0)
        found = {
            "first symbol at": symbols.int().argmax(1),
            "last symbol at": at.amax(1),
            "mean place of symbols": at.sum(1) / symbols.sum(1),
            "different symbols": different(x, symbols),
        }
    elif task == "compression":
        found = {"different symbols": different(x[:, :-1], every[:, :-1]), "mean id": x[:, :-1].double().mean(1)}
    else:
        found = {
            "different keys": different(x, x < keys),
            "tokens of keys": (x < keys).sum(1),
            "mean id of keys": torch.where(x < keys, x, 0).sum(1) / (x < keys).sum(1),
            "share of noise": (x >= 16).double().mean(1),
            "padding": (x == 15).sum(1),
            "tokens since the last key": since_last_key(prompt),
        }
    return {**found, "scored": prompt.scored.sum(1)}[what]


@pytest.mark.parametrize("name", MAD)
def test_prompts_are_as_in_the_code_of_mad(name: str) -> None:
    where, what = name.split(": ")
    task, _, split = where.partition(", ")
    hold(name, measured(task, split or "train", what), MAD[name], RARE.get(name, 0.15))
