"""Adapters on linear layers in training, by peft: LoRA (2106.09685), DoRA (2402.09353), (IA)^3 (2205.05638).

The model that comes out is a plain one again, with the adapters merged into its weights; so is each checkpoint's, which
holds beside it what training goes on from: the weights below the adapters, and the adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contextlab.errors import InputError, ResourceError
from contextlab.files import write_tensors
from contextlab.lazy import without_logs
from contextlab.models.draws import OwnDraws
from contextlab.models.forms import formed_layers, linear_layers, name_of_form
from contextlab.training.freeze import matching
from contextlab.training.spec import Ia3Spec, LoraSpec

FILES = ("adapter_config.json", "adapter_model.safetensors")
"""As peft writes and reads an adapter."""


@contextmanager
def adapted(model: nn.Module, spec: LoraSpec | Ia3Spec | None, seed: int = 0) -> Iterator[Adapters | None]:
    """Within, the model has adapters, where a spec asks for them; afterwards it is plain, with them in its weights."""
    if spec is None:
        yield None
        return
    adapters = Adapters(model, spec, seed)
    try:
        yield adapters
    finally:
        adapters.leave()


class _Adapted(NamedTuple):
    """A layer with an adapter. parent, attribute: where it stands. layer: peft's. base: the layer below."""

    name: str
    parent: nn.Module
    attribute: str
    layer: Any
    base: nn.Linear


def adapter_targets(model: nn.Module, spec: LoraSpec | Ia3Spec, where: str | None = None) -> list[str]:
    """The names of the linear layers that get an adapter.

    where: what an error begins with; `train.lora` or `train.ia3` unless the spec was given elsewhere.

    Raises InputError for a pattern that names none, a rank that no layer has, and for `also` where it names none
    or what is adapted.
    """
    where = where or f"train.{spec.kind}"
    if hasattr(model, "peft_config"):
        raise InputError(f"{where}: the model has adapters of its own; merge them first (merge_and_unload)")
    layers, forms = linear_layers(model, ends=True), formed_layers(model)
    if not layers and not forms:
        raise InputError(f"{where}: the model has no dense linear layer, on which alone an adapter can be merged")
    targets = matching(spec.targets, [*layers, *forms], f"{where}.targets", "linear layer")
    for name in targets:
        if name in forms:
            dense = next((f"name layers that are dense, such as {each!r}, or " for each in layers), "")
            raise InputError(
                f"{where}.targets: {name} is stored as {name_of_form(forms[name])}, which no adapter can be merged "
                f"into; {dense}put LoRA beside it (contextlab shrink --heal-with lora)"
            )
    if isinstance(spec, LoraSpec):
        check_rank(spec, [layers[name] for name in targets], where)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for name in matching(spec.also, names, f"{where}.also", "parameter"):
        if name.removesuffix(".weight") in targets:
            raise InputError(f"{where}.also: {name} has an adapter; leave it out here or in targets")
    return targets


def check_rank(spec: LoraSpec, layers: Iterable[Any], where: str) -> None:
    """Raises InputError for a rank that none of the layers, which have `in_features` and `out_features`, can have."""
    most = max(min(layer.in_features, layer.out_features) for layer in layers)
    if spec.rank > most:
        raise InputError(
            f"{where}.rank: {spec.rank} is more than any matrix of these layers has; expected at most {most}"
        )


def _config(spec: LoraSpec | Ia3Spec, targets: list[str]) -> Any:
    """peft's configuration of adapters on these layers."""
    peft = require_peft(f"train.{spec.kind}")
    if isinstance(spec, LoraSpec):
        return peft.LoraConfig(
            r=spec.rank, lora_alpha=spec.alpha or spec.rank, target_modules=targets, use_dora=spec.dora, bias="none"
        )
    of_inputs = [name for name in targets if any(fnmatchcase(name, pattern) for pattern in spec.inputs)]
    return peft.IA3Config(target_modules=targets, feedforward_modules=of_inputs)


class _ZerosStay:
    """What peft's LoRA layer does in a variant of ours: W x + (M * B A) x, with M 1 where W is not zero.

    The methods are those of peft's `LoraVariant`. A matrix of zeros alone has nothing to keep.
    """

    @staticmethod
    def change(module: Any, adapter: str) -> Tensor:
        """[O, I], what is added to the weight."""
        stays = module.get_base_layer().weight != 0
        delta: Tensor = module.get_delta_weight(adapter)
        return torch.where(stays | ~stays.any(), delta, 0.0)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **others: Any) -> Tensor:
        """x [..., I], what the layer made of it [..., O] -> the same with the adapter, [..., O]."""
        return result + nn.functional.linear(x, _ZerosStay.change(module, active_adapter))

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the adapter to the weight [O, I], in place."""
        orig_weight.data += _ZerosStay.change(module, active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight [O, I] again, as far as its digits go; `Adapters` puts back the one that it kept."""
        return orig_weight - _ZerosStay.change(module, active_adapter)


class Adapters:
    """Adapters on a model, in place; of its own parameters only `also` are trained, until `leave` merges and ends all.

    model: which gets them. seed: of their first matrices; the second ones are zero, so that the model starts as it is.

    Raises InputError as `adapter_targets` does, and ResourceError without peft.
    """

    def __init__(self, model: nn.Module, spec: LoraSpec | Ia3Spec, seed: int = 0) -> None:
        targets = adapter_targets(model, spec)
        self.config = _config(spec, targets)
        from peft import inject_adapter_in_model

        masked = isinstance(spec, LoraSpec) and spec.keep_zeros
        self.model, self.alone = model, not (spec.also or masked)
        self.needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        named = dict(model.named_parameters(remove_duplicate=False))
        also = [named[name] for name in matching(spec.also, named, f"train.{spec.kind}.also", "parameter")]
        bases = {name: model.get_submodule(name) for name in targets}
        with OwnDraws(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(self.config, model)
        self.layers = []
        for name, base in bases.items():
            parent, _, attribute = name.rpartition(".")
            place = model.get_submodule(parent)
            layer: Any = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            if masked:
                layer.lora_variant["default"] = _ZerosStay
            self.layers.append(_Adapted(name, place, attribute, layer, base))
        for parameter in also:
            parameter.requires_grad_(True)
        model.train(model.training)

    def tensors(self) -> dict[str, Tensor]:
        """The adapters and the weights below them, each of the shape of its parameter, by name."""
        found = {}
        for each in self.layers:
            for name, parameter in each.layer.named_parameters():
                found[f"adapters.{each.name}.{name}"] = parameter.detach()
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave, of the same shapes."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Within, the model is without its adapters."""
        for each in self.layers:
            setattr(each.parent, each.attribute, each.base)
        try:
            yield
        finally:
            for each in self.layers:
                setattr(each.parent, each.attribute, each.layer)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within, the model is plain, with the adapters in its weights; afterwards all is bit for bit as before."""
        before = [(parameter, parameter.data) for each in self.layers for parameter in each.base.parameters()]
        try:
            self._merge()
            with self.plain():
                yield
        finally:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is not exact: the next lines make it so
                for each in self.layers:
                    each.layer.unmerge()
            for parameter, data in before:
                parameter.data = data

    def leave(self) -> None:
        """Merge the adapters into the weights and remove them."""
        self._merge()
        for each in self.layers:
            setattr(each.parent, each.attribute, each.base)
        for parameter, needed in self.needed:
            parameter.requires_grad_(needed)
        del self.model.peft_config

    def _merge(self) -> None:
        for each in self.layers:
            for parameter in each.base.parameters():
                parameter.data = parameter.data.clone()
            with torch.no_grad():
                each.layer.merge()

    def write(self, folder: Path) -> None:
        """Write the adapter as peft does, for `peft.PeftModel.from_pretrained` on the model below, within `merged`.

        Not where `also` is trained or zeros are kept, as the adapter then is not the whole.
        """
        if not self.alone:
            return
        from peft import get_peft_model_state_dict

        for each in self.layers:  # they are not, while the model is in use
            setattr(each.parent, each.attribute, each.layer)
        try:
            tensors = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        finally:
            for each in self.layers:
                setattr(each.parent, each.attribute, each.base)
        # Its names are those within a PeftModel.
        write_tensors(folder / FILES[1], {f"base_model.model.{name}": each for name, each in tensors.items()})
        self.config.save_pretrained(str(folder))


def require_peft(where: str = f"train.{LoraSpec.kind}") -> Any:
    """The package. Raises ResourceError where it is not installed. where: what asks for it."""
    try:
        with without_logs():  # it imports transformers, and torchao where that is installed
            import peft
    except ImportError:
        raise ResourceError(f"{where}: needs the package peft; pip install 'contextlab[peft]'") from None
    return peft
