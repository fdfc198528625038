"""Which model it is, by what it is made of."""

from __future__ import annotations

import hashlib

import torch

from contextlab.models.stack import Model


def fingerprint(model: Model) -> str:
    """A digest of a model's spec and weights: what was begun with a model goes on only with that one."""
    digest = hashlib.sha256(model.spec.model_dump_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
