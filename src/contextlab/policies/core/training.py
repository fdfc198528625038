"""How a policy trains what it serves, and keeps what was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.errors import InputError, check_whole
from contextlab.files import read_json, read_tensors, write_json, write_tensors


def write_trained(folder: Path, policy: str, modules: Sequence[nn.Module], **more: int) -> None:
    """Write what was trained of a policy, a module a layer: POLICY.safetensors, and POLICY.json of their number."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{i}.{name}": x for i, module in enumerate(modules) for name, x in module.state_dict().items()}
    write_tensors(folder / f"{policy}.safetensors", tensors)
    write_json(folder / f"{policy}.json", {"policy": policy, "layers": len(modules), **more})


def read_trained(folder: Path, policy: str, otherwise: str) -> tuple[int, dict[str, Tensor]]:
    """What `write_trained` wrote: the number of layers, and "LAYER.NAME" -> tensor [...].

    Raises InputError where the files cannot be read, and with the words `otherwise` where they are of something else.
    """
    path = folder / f"{policy}.json"
    spec, tensors = read_json(path), read_tensors(folder / f"{policy}.safetensors")
    if not isinstance(spec, dict) or spec.get("policy") != policy or not isinstance(spec.get("layers"), int):
        raise InputError(f"{path}: {otherwise}")
    return spec["layers"], tensors


def language_training(
    model: Any,
    tokens: Tensor,
    groups: list[dict[str, Any]],
    *,
    steps: int,
    batch: int,
    seed: int,
    more: Callable[[int], Tensor] | None = None,
) -> list[float]:
    """Train weights by the cross-entropy of a model's next token, with AdamW.

    model: called on [batch, T] ids. tokens: [N, T] ids. groups: {"params": weights, "lr": the highest rate}, which is
    reached after a tenth of the steps and falls to 0 at the end; no other weight changes or gets a gradient.
    steps: each on `batch` rows drawn anew by `seed`. more: adds to the loss of a step, called after the model.

    Returns the cross-entropy of each step, nats a token. Raises InputError on impossible options.
    """
    check_whole(steps=(steps, 1), batch=(batch, 1))
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] < 2 or not len(tokens):
        raise InputError(f"tokens: expected ids [rows, time] of at least two tokens, got {list(tokens.shape)}")
    generator = torch.Generator().manual_seed(seed)
    weights = [weight for group in groups for weight in group["params"]]
    optimizer, warm = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0), max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: min((at + 1) / warm, (steps - at) / max(1, steps - warm))
    )
    losses = []
    with torch.enable_grad():
        for step in range(steps):
            rows = torch.randint(len(tokens), (min(batch, len(tokens)),), generator=generator)
            x = tokens[rows.to(tokens.device)]
            logits = model(x)
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
            losses.append(float(loss.detach()))
            total = loss if more is None else loss + more(step)
            gradients = torch.autograd.grad(total, weights, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
    for weight in weights:
        weight.grad = None
    return losses
