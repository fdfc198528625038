"""How far a construction is from its learner, at every prefix."""

from __future__ import annotations

import torch

from contextlab import build_model
from contextlab.constructions import Construction


def prompts(task, batch=3, seed=0):
    return task.sample(batch, torch.Generator().manual_seed(seed)).to(torch.float64)


def apart(said, wanted):
    """The largest difference over the largest size of an answer, 1 at least."""
    return float(((said - wanted).abs().max() / wanted.abs().max().clamp_min(1)).detach())


def answers(model, prompt):
    """Of a model that reads forward at once; of one that reads whole prompts, each prefix read by itself."""
    if model.spec.pool is None:
        return model(prompt.inputs)
    return torch.stack([model(prompt.inputs[:, : i + 1]) for i in range(prompt.length)], 1)


def distances(made: Construction, prompt, wanted):
    """Of the construction's weights in float64, and rounded to float32 as `build_model` leaves them."""
    models = made.build(torch.float64), build_model(made.spec()).double()
    return tuple(apart(answers(model, prompt), wanted) for model in models)


def distance(made: Construction, task, seed=0):
    """From the construction's learner, on prompts of a task that it fits."""
    made.check_task(task if made.spec().pool is None else task.replace(query="random", examples=task.examples + 1))
    prompt = prompts(task, seed=seed)
    return distances(made, prompt, made.learner()(prompt))
