"""Optimisers of PyTorch and of other packages (`TrainSpec.optimizer: package.Class`), saved without pickle.

A recipe only names a class: it is taken from the packages listed here, or from a plugin that whoever runs the recipe
names beside it, and from nowhere else; and it must be a `torch.optim.Optimizer`. But for these packages nothing is
imported because a file says so.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.errors import ContextlabError, InputError, ResourceError, first_line, unknown
from contextlab.plugins import plugin_module
from contextlab.spec import describe
from contextlab.training.optim import laid_out_as
from contextlab.training.spec import TrainSpec

PACKAGES = ("torch.optim", "schedulefree", "prodigyopt", "heavyball")
"""Of optimisers, which a recipe may name a class of."""
TRIAL_STEPS = 3


@lru_cache(maxsize=64)
def _listed_class(name: str) -> type[torch.optim.Optimizer]:
    package, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise ResourceError(
            f"train.optimizer: {name} needs the package {package}; pip install 'contextlab[optim]'"
        ) from None
    return _class_in(module, package, attribute)


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class that a recipe names, as "package.Class".

    Raises InputError where it is none, or is of a package that a recipe may not name, and ResourceError where the
    package is not installed.
    """
    package, _, attribute = name.rpartition(".")
    if package in PACKAGES:
        return _listed_class(name)
    module = plugin_module(package)
    if module is None:
        raise InputError(
            f"train.optimizer: {name}: expected muon, adamw, or a class of {', '.join(PACKAGES)}; one of your own, or "
            f"of another package, is taken where you name that as a plugin: --plugin {package}"
        )
    return _class_in(module, package, attribute)


def _class_in(module: Any, package: str, attribute: str) -> type[torch.optim.Optimizer]:
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        known = [
            each
            for each, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and not each.startswith("_")
        ]
        raise InputError(f"train.optimizer: {unknown(f'optimiser of {package}', attribute, known)}")
    return found


def is_foreign(spec: TrainSpec) -> bool:
    """Whether the optimiser is a class that is named, none of ours."""
    return "." in spec.optimizer


def keeps_its_rate(spec: TrainSpec) -> bool:
    """Whether the learning rate is the same at each step, as the optimiser says by methods `train` and `eval`.

    That is how schedule-free ones (2405.15682) tell that they are: they average in the place of a schedule, and have a
    warm-up of their own. They are to be asked for the average, by `eval`, wherever the model is used.
    """
    return is_foreign(spec) and _switches(optimizer_class(spec.optimizer))


def _switches(kind: type) -> bool:
    return callable(getattr(kind, "train", None)) and callable(getattr(kind, "eval", None))


class Foreign:
    """An optimiser of another package, at work on a model's parameters.

    params: name -> parameter, of any shape.
    spec: optimizer, optimizer_options, learning_rate, weight_decay and clip are read.

    Raises InputError where the optimiser cannot be made so, or could not be resumed exactly.
    """

    def __init__(self, params: Mapping[str, Tensor], spec: TrainSpec) -> None:
        require_resumable(spec, {each.ndim for each in params.values()}, next(iter(params.values())).device)
        self._make(params, spec)

    def _make(self, params: Mapping[str, Tensor], spec: TrainSpec) -> None:
        self.params, self.spec = dict(params), spec
        self.optimizer = _made(self.params, spec)
        self.switches = _switches(type(self.optimizer))
        if self.switches:
            self.optimizer.train()  # type: ignore[attr-defined]
        self.made_with = _bytes_in(self.optimizer.state_dict(), "optimizer")

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        """One step. gradients: name -> gradient, each in the shape of its parameter."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for name, parameter in self.params.items():
            own = laid_out_as(parameter, gradients[name])
            # Autograd may give one tensor to two parameters, and an optimiser may change it; clipping makes new ones.
            parameter.grad = own.clone() if self.spec.clip is None else own
        self.optimizer.step()
        for parameter in self.params.values():
            parameter.grad = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the parameters are those that a model is used with; afterwards they are bit for bit as before."""
        if not self.switches:
            yield
            return
        before = {name: parameter.detach().clone() for name, parameter in self.params.items()}
        self.optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.optimizer.train()  # type: ignore[attr-defined]
            self._put(before)

    def leave(self) -> None:
        """Leave the parameters as a model is used with them: nothing is trained any more."""
        if self.switches:
            self.optimizer.eval()  # type: ignore[attr-defined]

    def pack(self) -> tuple[dict[str, Tensor], Any]:
        """The state as tensors of any shape, by name, and as plain data. Raises InputError for what is neither."""
        tensors: dict[str, Tensor] = {}
        plain = _pack(self.optimizer.state_dict(), "optimizer", tensors, self)
        if self.switches:
            tensors |= {f"parameters.{name}": each.detach().clone() for name, each in self.params.items()}
        return tensors, plain

    def unpack(self, tensors: Mapping[str, Tensor], plain: Any) -> None:
        """Take over what `pack` gave: tensors of any shape. Raises InputError where a part is missing."""
        try:
            self.optimizer.load_state_dict(_unpack(plain, tensors, self.made_with))
            if self.switches:
                self._put({name: tensors[f"parameters.{name}"] for name in self.params})
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"a checkpoint of another optimiser: {first_line(error)}") from None

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.params.items():
                parameter.copy_(values[name])


def _made(params: Mapping[str, Tensor], spec: TrainSpec) -> torch.optim.Optimizer:
    kind = optimizer_class(spec.optimizer)
    try:
        takes = inspect.signature(kind).parameters
    except ValueError:
        takes = inspect.signature(kind.__init__).parameters
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values())
    options = {**(spec.optimizer_options or {}), "lr": spec.learning_rate}
    if not anything:
        stray = [name for name in options if name not in takes]
        if stray:
            known = [name for name in takes if name not in ("params", "lr", "weight_decay")]
            where = "learning_rate" if stray[0] == "lr" else f"optimizer_options.{stray[0]}"
            raise InputError(f"train.{where}: {unknown('option', stray[0], known, spec.optimizer)}")
    decays = anything or "weight_decay" in takes
    if spec.weight_decay and not decays:
        raise InputError(f"train.weight_decay: {spec.optimizer} has none; leave it out")
    groups: list[dict[str, Any]] = [{"params": list(params.values())}]
    if decays:
        options["weight_decay"] = 0.0
    if spec.weight_decay:  # of matrices only, as for our own
        large = [each for each in params.values() if each.ndim >= 2]
        small = [each for each in params.values() if each.ndim < 2]
        groups = [{"params": large, "weight_decay": spec.weight_decay}, {"params": small}]
        groups = [group for group in groups if group["params"]]
    try:
        return kind(groups, **options)
    except ContextlabError:
        raise
    except Exception as error:
        raise InputError(f"train.optimizer: {spec.optimizer}: {type(error).__name__}: {first_line(error)}") from None


# ---- state without pickle ----


def _pack(value: Any, path: str, tensors: dict[str, Tensor], of: Foreign) -> Any:
    """A tree of tensors and plain data as JSON has it; the tensors are put into `tensors`, named by their paths.

    Bytes, which heavyball pickles what it was made with to, are never written: a new optimiser has the same.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path, "device": value.device.type}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_pack(each, f"{path}.{i}", tensors, of) for i, each in enumerate(value)]}
    if type(value) is set and all(type(each) in (int, str) for each in value):
        return {"set": sorted(value, key=str)}
    if isinstance(value, Mapping) and all(type(key) in (int, str) for key in value):
        return {"dict": [[key, _pack(each, f"{path}.{key}", tensors, of)] for key, each in value.items()]}
    if isinstance(value, bytes) and of.made_with.get(path) == value:
        return {"made_with": path}
    raise InputError(
        f"train.optimizer: {of.spec.optimizer} keeps {describe(value)} as {path}; a checkpoint holds tensors and plain "
        "numbers, and nothing that it would take a pickle to save"
    )


def _unpack(plain: Any, tensors: Mapping[str, Tensor], made_with: Mapping[str, bytes]) -> Any:
    ((kind, value),) = ((key, each) for key, each in plain.items() if key != "device")
    if kind == "tensor":
        return tensors[value].to(plain["device"])
    if kind == "dict":
        return {key: _unpack(each, tensors, made_with) for key, each in value}
    if kind in ("list", "tuple"):
        parts = [_unpack(each, tensors, made_with) for each in value]
        return parts if kind == "list" else tuple(parts)
    if kind == "set":
        return set(value)
    return made_with[value] if kind == "made_with" else value


def _bytes_in(value: Any, path: str) -> dict[str, bytes]:
    """The bytes in a tree, by their paths."""
    if isinstance(value, bytes):
        return {path: value}
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if type(value) in (list, tuple) else ()
    return {name: each for key, part in parts for name, each in _bytes_in(part, f"{path}.{key}").items()}


# ---- before the first step ----


def require_resumable(spec: TrainSpec, ndims: set[int], device: torch.device) -> None:
    """Refuse an optimiser that could not be gone on with exactly: it is tried on small parameters, once.

    ndims: dimensions of the parameters. Raises InputError.
    """
    kind = optimizer_class(spec.optimizer)  # the message for a class that is not there is not kept
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"train.optimizer: {spec.optimizer}: asks for the loss again within a step (a closure), which no training "
            "here gives; expected muon, adamw, or a class that takes gradients alone, such as torch.optim.NAdam"
        )
    read = spec.model_dump_json(include={"optimizer", "optimizer_options", "learning_rate", "weight_decay"})
    fault = _fault(read, tuple(sorted(ndims)), str(device))
    if fault:
        raise InputError(fault if fault.startswith("train.") else f"train.optimizer: {spec.optimizer}: {fault}")


@lru_cache(maxsize=64)
def _fault(read: str, ndims: tuple[int, ...], device: str) -> str:
    """What is wrong with an optimiser; "" for nothing. read: JSON of what of the TrainSpec it is made by."""
    spec = TrainSpec.parse({**json.loads(read), "clip": None})
    try:
        whole, resumed = (_small(ndims, device) for _ in range(2))
        first = _Trial(whole, spec)
        first.steps(0)
        tensors, plain = first.pack()
        tensors = {name: each.cpu().clone() for name, each in tensors.items()}
        plain = json.loads(json.dumps(plain))
        for name, parameter in resumed.items():
            parameter.data.copy_(whole[name])
        second = _Trial(resumed, spec)
        second.unpack(tensors, plain)
        for each in (first, second):
            each.steps(TRIAL_STEPS)
    except ContextlabError as error:
        return str(error)
    except Exception as error:
        return f"a step on trial failed with {type(error).__name__}: {first_line(error)}"
    if all(torch.equal(whole[name], resumed[name]) for name in whole):
        return ""
    return (
        "a training that is gone on with from its state_dict differs from one that was never stopped: it keeps "
        "something elsewhere, or draws random numbers"
    )


class _Trial(Foreign):
    """The optimiser, without being tried itself."""

    def __init__(self, params: Mapping[str, Tensor], spec: TrainSpec) -> None:
        self._make(params, spec)

    def steps(self, start: int) -> None:
        for step in range(start, start + TRIAL_STEPS):
            generator = torch.Generator().manual_seed(step)
            gradients = {
                name: torch.randn(each.shape, generator=generator).to(each) for name, each in self.params.items()
            }
            self.step(gradients, self.spec.learning_rate)


def _small(ndims: tuple[int, ...], device: str) -> dict[str, Tensor]:
    """Parameters of these dimensions, small ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = {ndim: [4, 3, 2, 2, 2, 2][:ndim] for ndim in ndims}
    return {
        f"of{ndim}": nn.Parameter(torch.randn(shape, generator=generator).to(device)) for ndim, shape in shapes.items()
    }
