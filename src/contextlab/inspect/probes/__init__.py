"""The probes, one instrument a file: each measures one thing inside a trained model (see `contextlab.inspect.look`)."""

from contextlab.inspect.probes import (
    ablation,
    algorithm,
    attribution,
    attribution_patching,
    circuit,
    formation,
    head_groups,
    heads,
    influence,
    lens,
    linear,
    patching,
    state_use,
    state_vector,
    survival,
    task_vector,
)

__all__ = [
    "ablation",
    "algorithm",
    "attribution",
    "attribution_patching",
    "circuit",
    "formation",
    "head_groups",
    "heads",
    "influence",
    "lens",
    "linear",
    "patching",
    "state_use",
    "state_vector",
    "survival",
    "task_vector",
]
