"""Sparse dictionaries of what flows through a place: TopK and JumpReLU autoencoders, and transcoders between places."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.evaluation.evaluate import _evaluating, predict
from contextlab.files import read_tensors, write_atomic, write_tensors
from contextlab.inspect.capturing import capture, patch
from contextlab.inspect.fitting import FitSpec, Weights, fit
from contextlab.inspect.layout import STATE, chosen
from contextlab.models import Model
from contextlab.prompt import Prompt, Task

Kind = Literal["topk", "jumprelu"]
BATCH = 256
"""Prompts that are read at once."""
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAE_LENS = "6.0.0"
"""The version of sae-lens from which on folders have the form that is written here."""


@dataclass(frozen=True)
class Dictionary:
    """Sparse features of what flows through a place, of which each has a direction.

    encode: f = activation((x - b_dec) W_enc + b_enc), of a transcoder without b_dec; decode: f W_dec + b_dec.
    The activation of "topk" keeps the k largest that are above 0 (2406.04093), that of "jumprelu" what is above each
    unit's threshold (2407.14435).

    w_enc: [d_in, units]. b_enc: [units]. w_dec: [units, d_out], rows of norm 1: the features' directions.
    b_dec: [d_out]. threshold: [units], of "jumprelu".
    site: the place that is read. target: the place that is written; "" for an autoencoder.
    """

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    kind: Kind = "topk"
    k: int = 0
    threshold: Tensor | None = None
    site: str = ""
    target: str = ""

    @property
    def units(self) -> int:
        return self.w_enc.shape[1]

    def encode(self, x: Tensor) -> Tensor:
        """Features [..., units] of x [..., d_in]."""
        x = x.to(self.w_enc)
        before = (x if self.target else x - self.b_dec) @ self.w_enc + self.b_enc
        if self.threshold is not None:
            return before.relu() * (before > self.threshold)
        top = before.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(before).scatter_(-1, top.indices, top.values.relu())

    def decode(self, features: Tensor) -> Tensor:
        """What features [..., units] stand for, [..., d_out]."""
        return features @ self.w_dec + self.b_dec

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., d_in], encoded and decoded: [..., d_out], of the type of x."""
        return self.decode(self.encode(x)).to(x.dtype)

    def save(self, folder: str | Path) -> Path:
        """Write it as a folder that sae-lens loads (`SAE.load_from_disk`): cfg.json and sae_weights.safetensors.

        Raises InputError for a TopK transcoder, which sae-lens does not have.
        """
        if self.target and self.kind == "topk":
            raise InputError("save: sae-lens has no TopK transcoder; train one of kind jumprelu")
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        architecture = f"{self.kind}_transcoder" if self.target else self.kind
        metadata: dict[str, Any] = {
            "sae_lens_version": SAE_LENS,
            "sae_lens_training_version": None,
            "hook_name": self.site,
            "k": self.k,
        }
        config: dict[str, Any] = {
            "architecture": architecture, "d_in": self.w_enc.shape[0], "d_sae": self.units, "dtype": "float32",
            "device": "cpu", "apply_b_dec_to_input": not self.target, "normalize_activations": "none",
            "reshape_activations": "none", "metadata": metadata,
        }  # fmt: skip
        tensors = {"W_enc": self.w_enc, "b_enc": self.b_enc, "W_dec": self.w_dec, "b_dec": self.b_dec}
        if self.kind == "topk":
            config |= {"k": self.k, "rescale_acts_by_decoder_norm": False}
        if self.threshold is not None:
            tensors["threshold"] = self.threshold
        if self.target:
            config["d_out"] = self.w_dec.shape[1]
            metadata["hook_name_out"] = self.target
        write_tensors(path / WEIGHTS, {name: value.float() for name, value in tensors.items()})
        write_atomic(path / CONFIG, json.dumps(config, indent=1).encode())
        return path

    @staticmethod
    def load(folder: str | Path) -> Dictionary:
        """What `save` wrote. Raises InputError where it is not such a folder."""
        path = Path(folder)
        try:
            config = json.loads((path / CONFIG).read_text())
            kind, _, rest = config["architecture"].partition("_")
            metadata = config["metadata"]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: expected a folder with {CONFIG} of a dictionary ({error})") from None
        if kind not in ("topk", "jumprelu") or rest not in ("", "transcoder"):
            raise InputError(f"{path}: expected a dictionary of kind topk or jumprelu, got {config['architecture']}")
        found = read_tensors(path / WEIGHTS)
        return Dictionary(
            found["W_enc"], found["b_enc"], found["W_dec"], found["b_dec"], kind, metadata.get("k") or 0,
            found.get("threshold"), metadata.get("hook_name") or "", metadata.get("hook_name_out") or "",
        )  # fmt: skip


def dictionary_of(weights: Weights, spec: FitSpec, site: str = "", target: str = "") -> Dictionary:
    """A dictionary of weights that were fitted."""
    return Dictionary(**weights._asdict(), kind=spec.kind, k=spec.k, site=site, target=target)


def train_dictionary(
    model: Model,
    task: Task,
    site: str,
    *,
    target: str = "",
    kind: Kind = "topk",
    units: int = 0,
    k: int = 8,
    tokens: int = 32768,
    steps: int = 1000,
    batch: int = 512,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Dictionary:
    """A sparse autoencoder of a place, or a transcoder from it to another, trained on what flows in a task's prompts.

    model: of ours, left as it is. task: whose prompts it reads, all tokens of them.
    site: a place that holds tensors [B, T, ...], such as "blocks.1.output"; heads of one are put side by side.
    target: "" for an autoencoder; for a transcoder the place that is to be told from the site, such as
        "blocks.1.mlp.output" of "blocks.1.mlp.input".
    kind: "topk" (2406.04093) or "jumprelu" (2407.14435). units: 0 for four times the numbers at the site.
    k: features a token, at most of topk, on average of jumprelu. tokens: that are drawn to train on.
    steps, batch, learning_rate: of training, in tokens. seed: of prompts and of all that is drawn.

    Raises InputError where the site holds no tensor for each token.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    drawn = torch.Generator(device).manual_seed(seed)
    count = -(-tokens // task.sample(1, torch.Generator(device).manual_seed(seed), device).length)
    x, y = flowing(model, task.sample(count, drawn, device), site, target)
    spec = FitSpec(kind, units or 4 * x.shape[-1], k, steps, batch, learning_rate)
    weights = fit(x.flatten(0, 1), None if y is None else y.flatten(0, 1), spec, generator)
    return dictionary_of(weights, spec, site, target)


@torch.no_grad()
def flowing(model: Model, prompt: Prompt, site: str, target: str = "") -> tuple[Tensor, Tensor | None]:
    """What flows through a place, [N, T, d] float32, and through the target."""
    names = [site, target] if target else [site]
    for name in names:
        found = chosen(model, name)
        if len(found) != 1 or name not in found or found[name].point == STATE or found[name].routed:
            raise InputError(f"{name}: expected one place that holds a tensor [B, T, ...] for all tokens")
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    dtype = next(model.parameters()).dtype
    with _evaluating(model):
        for first in range(0, prompt.batch, BATCH):
            part = prompt.rows(first, min(first + BATCH, prompt.batch)).to(dtype)
            with capture(model, names) as taken:
                predict(model, part)
            for name in names:
                value = taken[name]
                if not isinstance(value, Tensor) or value.shape[:2] != part.inputs.shape[:2] or value.ndim < 3:
                    raise InputError(f"{name}: holds no tensor [B, T, ...]; take another place")
                kept[name].append(value.flatten(2).float())
    values = [torch.cat(kept[name]) for name in names]
    return values[0], values[1] if target else None


class PutIn:
    """What a dictionary makes of what flows through its site, put into its place; `edits` are for `patch`."""

    def __init__(self, dictionary: Dictionary) -> None:
        self._dictionary, self._read = dictionary, list[Tensor]()
        name = dictionary.site
        if dictionary.target:
            self.edits = {name: self._keep, dictionary.target: self._tell}
        else:
            self.edits = {name: self._make}

    def _keep(self, value: Tensor) -> Tensor:
        self._read.append(value.flatten(2))
        return value

    def _tell(self, value: Tensor) -> Tensor:
        return self._dictionary(self._read.pop()).to(value).view_as(value)

    def _make(self, value: Tensor) -> Tensor:
        return self._dictionary(value.flatten(2)).to(value).view_as(value)


@torch.no_grad()
def losses(model: Model, task: Task, prompts: list[Prompt], edits: dict[str, Any] | None = None) -> Tensor:
    """The task's loss of each group of prompts, [groups], with something put into places."""
    with _evaluating(model), patch(model, edits or {}):
        return torch.stack([task.loss(predict(model, each), each).double() for each in prompts])
