"""Load a model: ours from a folder, or a Hugging Face checkpoint, by folder or hub name.

`load` gives every causal language model of `transformers` the surface of `contextlab.models.Model`: `forward`, `read`
with a `State` that is handed on, `generate`, `state_nbytes`, `flops`. Only safetensors are read.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ModelWrapValidatorHandler, model_validator
from torch import Tensor, nn

from contextlab.compat import cache_argument
from contextlab.errors import InputError, ResourceError, nearest
from contextlab.files import read_json
from contextlab.models.draws import OwnDraws
from contextlab.models.generation import generate
from contextlab.models.imports import native_model
from contextlab.models.io import SPEC, load_model
from contextlab.models.padding import padding
from contextlab.models.stack import Model
from contextlab.spec import Spec
from contextlab.state import State, own

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Types whose code in transformers (5.x) cannot do what `read` needs, found by holding them to the laws:
STEPWISE = ("mamba", "falcon_mamba", "jamba")  # continue a state by one token at a time only
ROW_BY_ROW = ("rwkv",)  # mix up the rows of a batch when they read one token
UNPADDED = ("rwkv", "xlstm")  # take no notice of padding
PIECE_MASK = ("mamba", "mamba2", "falcon_mamba")  # expect the mask of the piece that is read, not of all that was

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


class HuggingFaceSpec(Spec):
    """What a Hugging Face model is.

    kind: its `model_type`. config: its configuration, as `config.json` holds it.
    input_size, output_size: token ids. read_in: always "token".
    """

    kind: str
    config: dict[str, Any]
    input_size: int
    output_size: int
    read_in: Literal["token"] = "token"

    @model_validator(mode="wrap")
    @classmethod
    def _numbers(cls, data: Any, handler: ModelWrapValidatorHandler[HuggingFaceSpec]) -> HuggingFaceSpec:
        """Any numbers: configurations of transformers hold infinities, where they limit nothing."""
        return handler(data)


@dataclass
class HuggingFaceState(State):
    """What a Hugging Face model remembers: the tensors of its cache.

    leaves: the tensors that have the batch first and the states that policies left, in the order of their slots in
        `form`.
    start: [B] int64, the left-padding tokens of each row.
    form: the cache with empty slots in their places.
    padded: whether any piece came with a mask.
    """

    leaves: list[Tensor | State]
    start: Tensor
    form: Any = dataclasses.field(default=None, metadata={"static": True})
    padded: bool = dataclasses.field(default=False, metadata={"static": True})


class HuggingFaceModel(nn.Module):
    """A causal language model of `transformers` with the surface of our `Model`.

    model: for example what `AutoModelForCausalLM.from_pretrained` returns.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        self.spec = HuggingFaceSpec(
            kind=model.config.model_type,
            config=model.config.to_dict(),
            input_size=config.vocab_size,
            output_size=config.vocab_size,
        )
        known = inspect.signature(model.forward).parameters
        cache = cache_argument(model.forward)
        if cache is None:
            raise InputError(f"{self.spec.kind}: the model takes no cache, so it has no state to hand on")
        self._cache = cache
        self._knows_positions = "position_ids" in known
        self._masked = "attention_mask" in known and self.spec.kind not in UNPADDED
        self._reach: list[tuple[int, int | None]] | None = None
        self.train(model.training)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] at every position of whole sequences [B, T], keeping no state; see `Model.forward`."""
        self._check(inputs, None)
        padded = padding(mask, inputs, begun=False, waiting=None)
        inputs, mask = padded.moved(inputs), padded.mask
        given = self._masks(mask, None if mask is None else (~mask).sum(1), 0, inputs.shape[1])
        return padded.back(self.model(input_ids=inputs, use_cache=False, **given).logits)

    def read(
        self, inputs: Tensor, state: HuggingFaceState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, HuggingFaceState]:
        """Read inputs [B, T] on from `state` (None at the start) -> logits [B, T, V], state; see `Model.read`.

        The state passed in stays valid.
        """
        self._check(inputs, state)
        begun = state is not None and state.length > 0
        waiting = None if state is None or mask is None else tuple((state.start >= state.length).tolist())
        placed = padding(mask, inputs, begun, waiting)
        logits, after = self._read_on(placed.moved(inputs), state, placed.mask)
        return placed.back(logits), after

    def _read_on(
        self, inputs: Tensor, state: HuggingFaceState | None, mask: Tensor | None
    ) -> tuple[Tensor, HuggingFaceState]:
        """`read`, with padding on the left."""
        if state is not None and mask is not None and (cuts := _begins(mask)):
            return self._in_pieces(inputs, state, mask, cuts)
        if state is not None and inputs.shape[1] > 1 and self.spec.kind in STEPWISE:
            return self._stepwise(inputs, state, mask)
        if state is not None and inputs.shape == (len(inputs), 1) and len(inputs) > 1 and self.spec.kind in ROW_BY_ROW:
            return self._row_by_row(inputs, state, mask)
        length = 0 if state is None else state.length
        start = inputs.new_zeros(inputs.shape[0]) if state is None else state.start
        padded = mask is not None or (state is not None and state.padded)
        if mask is not None:
            start = start + (~mask).sum(1)
        given = self._masks(mask, start if padded else None, length, inputs.shape[1])
        if state is not None:
            given[self._cache] = _filled(state.form, iter(state.leaves))
        output = self.model(input_ids=inputs, use_cache=True, **given)
        if not torch.is_grad_enabled() and not bool(output.logits.isfinite().all()):
            raise InputError(self._first_fault(inputs, given))
        if output.get(self._cache) is None:
            raise InputError(
                f"{self.spec.kind}: transformers' model does not return its cache, so it has no state to hand on"
            )
        leaves: list[Tensor | State] = []
        form = _emptied(output[self._cache], inputs.shape[0], leaves)
        # Policies' states know the padding of each row, too: it is not held twice.
        starts = (getattr(x, "start", None) for x in leaves if isinstance(x, State))
        start = next((x for x in starts if isinstance(x, Tensor)), start)
        length += inputs.shape[1]
        if mask is not None and bool((waiting := start >= length).any()):
            # Not all layers of transformers heed the mask of a piece, but what padding left is no row's memory.
            leaves = [x if isinstance(x, State) else _without_rows(x, waiting) for x in leaves]
        return output.logits, HuggingFaceState(leaves, start, form, padded, length=length)

    def _in_pieces(
        self, inputs: Tensor, state: HuggingFaceState, mask: Tensor, cuts: list[int]
    ) -> tuple[Tensor, HuggingFaceState]:
        """Read on with a cut wherever a row begins, so that within a piece a row is padding only or tokens only."""
        logits = []
        for first, last in pairwise([0, *cuts, inputs.shape[1]]):
            each, state = self._read_on(inputs[:, first:last], state, mask[:, first:last])
            logits.append(each)
        return torch.cat(logits, 1), state

    def recached(self, state: HuggingFaceState, change: Callable[[Any, Tensor, bool], None]) -> HuggingFaceState:
        """The state after its cache was changed in place by change(cache, start, padded); the one given stays valid.

        start: [B] int64, padding on the left of each row. padded: whether there is any.
        """
        if not isinstance(state, HuggingFaceState):
            raise InputError(f"expected the state of a Hugging Face model, got {type(state).__name__}")
        cache = _filled(state.form, iter(state.leaves))
        change(cache, state.start, state.padded)
        leaves: list[Tensor | State] = []
        return dataclasses.replace(state, form=_emptied(cache, len(state.start), leaves), leaves=leaves)

    @torch.no_grad()
    def _first_fault(self, inputs: Tensor, given: dict[str, Any]) -> str:
        """Where NaN or infinity first appears, in words."""
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                return f"the model's parameter {name!r} holds NaN or infinity"
        found: list[str] = []

        def look(name: str, layer: nn.Module) -> Any:
            def hook(module: nn.Module, arguments: Any, result: Any) -> None:
                hidden = result[0] if isinstance(result, tuple) else result
                if not found and isinstance(hidden, Tensor) and not bool(hidden.isfinite().all()):
                    found.append(f"layer {name!r} gives NaN or infinity")

            return layer.register_forward_hook(hook)

        layers = [(n, m) for n, m in self.model.named_modules() if re.search(r"\.(layers|h|blocks)\.\d+$", n)]
        hooks = [look(name, layer) for name, layer in layers]
        given = {key: value for key, value in given.items() if key != self._cache}  # the model may have written into it
        try:
            self.model(input_ids=inputs, use_cache=False, **(given if "attention_mask" not in given else {}))
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else "the logits hold NaN or infinity"

    def _stepwise(
        self, inputs: Tensor, state: HuggingFaceState, mask: Tensor | None
    ) -> tuple[Tensor, HuggingFaceState]:
        """Read on one token at a time, for models whose code continues a state by single tokens only."""
        logits = []
        for t in range(inputs.shape[1]):
            each, state = self._read_on(inputs[:, t : t + 1], state, None if mask is None else mask[:, t : t + 1])
            logits.append(each)
        return torch.cat(logits, 1), state

    def _row_by_row(
        self, inputs: Tensor, state: HuggingFaceState, mask: Tensor | None
    ) -> tuple[Tensor, HuggingFaceState]:
        """Read on with each row alone, for models whose code takes a single token for a batch of one only."""
        rows = torch.arange(len(inputs), device=inputs.device)
        masks = [None] * len(inputs) if mask is None else mask.split(1)
        read = [self._read_on(inputs[i : i + 1], state.select(rows[i : i + 1]), masks[i]) for i in rows.tolist()]
        parts: Any = zip(*(after.leaves for _, after in read), strict=True)
        leaves: list[Tensor | State] = [torch.cat(each) for each in parts]
        start = torch.cat([after.start for _, after in read])
        after = dataclasses.replace(read[0][1], leaves=leaves, start=start, padded=state.padded or mask is not None)
        return torch.cat([logits for logits, _ in read]), after

    def generate(
        self,
        prompt: Tensor,
        tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Continue token sequences [B, T] one token at a time from the state: [B, T + tokens]; see `Model.generate`."""
        return generate(self, prompt, tokens, temperature=temperature, generator=generator, mask=mask)

    def _masks(self, mask: Tensor | None, start: Tensor | None, before: int, read: int) -> dict[str, Any]:
        """The mask over all that was read and each token's place in its row; nothing when nothing is padded."""
        if start is None:
            return {}
        if not self._masked:
            raise InputError(f"{self.spec.kind}: transformers' model takes no padding; give rows of equal length")
        places = torch.arange(before + read, device=start.device) - start[:, None]
        real = (places >= 0).to(torch.int64)
        given: dict[str, Any] = {"attention_mask": real[:, before:] if self.spec.kind in PIECE_MASK else real}
        if self._knows_positions:
            given["position_ids"] = places[:, before:].clamp_min(0)
        return given

    def _check(self, inputs: Tensor, state: State | None) -> None:
        if inputs.ndim != 2 or inputs.is_floating_point():
            raise InputError(f"expected token ids [B, T] int64, got {inputs.dtype} {list(inputs.shape)}")
        if state is None:
            return
        if not isinstance(state, HuggingFaceState):
            raise InputError(f"expected the state of a Hugging Face model, got {type(state).__name__}")
        if len(state.start) != len(inputs):
            raise InputError(f"the state has {len(state.start)} rows, the tokens have {len(inputs)}")

    @property
    def parameter_count(self) -> int:
        """Number of trainable values (tied weights once)."""
        return sum(p.numel() for p in self.parameters())

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """The exact bytes of the state after reading `length` tokens, in the model's own dtype.

        Found by reading two tokens: what is kept for each token grows with the length up to the layer's window.
        """
        if dtype is not None and dtype != self.model.dtype:
            raise InputError(f"the state of this model is in its own dtype, {self.model.dtype}; leave dtype out")
        if self._reach is None:
            self._reach = self._measure()
        row = sum(size if reach is None else size * min(length, reach) for size, reach in self._reach)
        return batch * (row + torch.int64.itemsize)

    @torch.no_grad()
    def _measure(self) -> list[tuple[int, int | None]]:
        """(bytes, longest reach) of each tensor of the state, bytes a token; (bytes, None) when they are constant."""
        training = self.training
        _, state = self.eval().read(torch.zeros(1, 2, dtype=torch.int64, device=self.model.device))
        self.train(training)
        found: list[tuple[int, int | None]] = []
        for layer, name, tensor in _places(state.form, iter(state.leaves)):
            if isinstance(tensor, State):
                raise InputError(
                    "a policy is attached, and the size depends on what it keeps; read the tokens and take state.nbytes"
                )
            size = tensor.numel() * tensor.element_size()
            if name not in ("keys", "values"):
                found.append((size, None))
            elif getattr(layer, "is_sliding", False):
                found.append((size // min(2, layer.sliding_window - 1), layer.sliding_window - 1))
            else:
                found.append((size // 2, 2**62))
        return found

    def flops(self, length: int) -> int:
        """Multiply-adds x 2 of one forward over one sequence: linear layers and the attention pairs in sight.

        The recurrences' own operations, small beside them, are not counted.
        """
        if self._reach is None:
            self._reach = self._measure()
        weights = sum(
            module.weight.numel()
            for module in self.model.modules()
            if isinstance(module, nn.Linear | nn.Conv1d) or type(module).__name__ == "Conv1D"
        )
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)
        shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
        pairs = 0
        for size, reach in self._reach:
            if reach is not None:
                seen = min(length, reach + (reach < 2**62))  # the token itself beside the ones held
                pairs += size // self.model.dtype.itemsize * (seen * (seen + 1) // 2 + (length - seen) * seen)
        return 2 * length * weights + 2 * shared * pairs


def load(
    source: str | Path,
    *,
    native: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Model | HuggingFaceModel:
    """Load a model from a folder or from the Hugging Face hub.

    source: a folder that `save_model` or `save_pretrained` wrote, a checkpoint's folder (config.json and safetensors),
        or a hub name such as "openai-community/gpt2".
    native: import a checkpoint's weights into our own stack (`contextlab.models.imports`) instead of running
        transformers' model; the logits are the same.
    dtype: of the weights; None keeps the checkpoint's.

    Raises InputError when there is nothing to load there, the architecture is unknown, tensors are missing, extra or
    misshapen, or the weights are pickled; ResourceError when `transformers` is not installed.
    """
    folder = Path(source)
    if (folder / SPEC).exists():
        model: Model | HuggingFaceModel = load_model(folder, device)
        return model if dtype is None else model.to(dtype)
    if not folder.exists():
        folder = downloaded(str(source))
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: no model there (expected config.json and *.safetensors, or {SPEC})")
    config_json = read_json(folder / "config.json")
    kind = config_json.get("model_type")
    _check_files(folder)
    transformers = _transformers()
    _known(transformers, str(folder), kind)
    try:
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            # torch's grouped products of experts know no float64
            **({"experts_implementation": "eager"} if dtype == torch.float64 else {}),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InputError(f"{folder}: {_line(error)}") from error
    _check_tensors(folder, info)
    theirs = theirs.eval().to(device)
    if native:
        tensors = dict(theirs.state_dict())
        return native_model(theirs.config, tensors, str(folder)).to(device)
    return HuggingFaceModel(theirs)


def describe_checkpoint(folder: str | Path) -> HuggingFaceSpec:
    """What the checkpoint in a folder is, from its config.json alone. Raises InputError as `load` does."""
    transformers = _transformers()
    folder = Path(folder)
    kind = read_json(folder / "config.json").get("model_type")
    _known(transformers, str(folder), kind)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    text = config.get_text_config()
    return HuggingFaceSpec(kind=kind, config=config.to_dict(), input_size=text.vocab_size, output_size=text.vocab_size)


def build_checkpoint(spec: HuggingFaceSpec, *, seed: int = 0) -> HuggingFaceModel:
    """A Hugging Face model with freshly drawn parameters, for costs and tests; no global generator is touched."""
    transformers = _transformers()
    _known(transformers, spec.kind, spec.kind)
    config = transformers.AutoConfig.for_model(**{**spec.config, "model_type": spec.kind})
    with OwnDraws(seed):
        return HuggingFaceModel(transformers.AutoModelForCausalLM.from_config(config).eval())


def _known(transformers: Any, source: str, kind: Any) -> None:
    """Raises InputError, with the nearest name, when transformers has no causal language model of that type."""
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in mapping:
        near = nearest(str(kind), mapping)
        hint = f"; the nearest that is known is {near!r}" if near else ""
        raise InputError(f"{source}: transformers has no causal language model of type {kind!r}{hint}")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ResourceError(
            "Hugging Face checkpoints need the package transformers; pip install 'contextlab[hf]'"
        ) from None
    return transformers


def downloaded(name: str, **options: Any) -> Path:
    """The local folder of a hub name. options: of `huggingface_hub.snapshot_download`.

    Raises InputError when it is none, or cannot be had.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"{name}: neither a folder nor a hub name; expected for example 'openai-community/gpt2'")
    _transformers()
    from huggingface_hub import snapshot_download

    try:
        files = ["*.json", "*.safetensors", "*.model", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=files, **options))
    except Exception as error:  # the hub's client raises errors of many libraries
        raise InputError(f"{name}: no such folder, and the hub gave no checkpoint ({_line(error)})") from error


def _check_files(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if pickled:
        raise InputError(
            f"{folder}: {pickled[0]} is a pickle, which can run any code when it is read, so it is refused; where you "
            "trust it, load it with transformers and call model.save_pretrained(folder), which writes safetensors"
        )
    raise InputError(f"{folder}: no weights there (expected *.safetensors)")


def _check_tensors(folder: Path, info: dict[str, Any]) -> None:
    misshapen = [f"{name} is {list(has)}, expected {list(due)}" for name, has, due in info.get("mismatched_keys", ())]
    parts = {
        "missing": sorted(info["missing_keys"]),
        "extra": sorted(info["unexpected_keys"]),
        "of another shape": sorted(misshapen),
    }
    faults = [
        f"{what}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for what, names in parts.items()
        if names
    ]
    if faults:
        raise InputError(f"{folder}: the tensors are not those of config.json; {'; '.join(faults)}")


def _line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class _Slot:
    """Where a tensor of a cache was; `fresh` when the model writes into it in place."""

    fresh: bool


def _is_cache(value: Any) -> bool:
    ours = type(value).__module__ == "contextlab.policies.huggingface"
    return ours or (type(value).__module__.startswith("transformers.") and "Config" not in type(value).__name__)


def _begins(mask: Tensor) -> list[int]:
    """Places within a left-padded piece, mask [B, T], at which a row begins, in order."""
    at = (~mask).sum(1)
    return sorted(set(at[(at > 0) & (at < mask.shape[1])].tolist()))


def _without_rows(leaf: Tensor, rows: Tensor) -> Tensor:
    """leaf [B, ...] with zeros in `rows` [B] bool, as before anything was read."""
    if not leaf.is_floating_point():
        return leaf
    return leaf.masked_fill(rows.view(-1, *(1,) * (leaf.ndim - 1)), 0)


def _emptied(value: Any, batch: int, leaves: list[Tensor | State], name: str = "") -> Any:
    """`value` with slots for the tensors that have the batch first and policies' states, all put into `leaves`."""
    if isinstance(value, State):
        leaves.append(value)
        return _Slot(fresh=False)
    if isinstance(value, Tensor):
        if value.ndim > 1 and value.shape[0] == batch and value.numel():
            leaves.append(own(value))
            return _Slot(fresh=name not in ("keys", "values"))
        return value.clone()
    if isinstance(value, dict):
        return {key: _emptied(each, batch, leaves, name) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_emptied(each, batch, leaves, name) for each in value)
    if _is_cache(value):
        shell = copy.copy(value)
        for key, each in vars(value).items():
            shell.__dict__[key] = _emptied(each, batch, leaves, key)
        return shell
    return value


def _filled(form: Any, leaves: Iterator[Any]) -> Any:
    """The cache again, with the tensors in their slots; those that the model overwrites are copies."""
    if isinstance(form, _Slot):
        tensor = next(leaves)
        return tensor.clone() if form.fresh else tensor
    if isinstance(form, Tensor):
        return form.clone()
    if isinstance(form, dict):
        return {key: _filled(each, leaves) for key, each in form.items()}
    if isinstance(form, list | tuple):
        return type(form)(_filled(each, leaves) for each in form)
    if _is_cache(form):
        shell = copy.copy(form)
        for key, each in vars(form).items():
            shell.__dict__[key] = _filled(each, leaves)
        return shell
    return form


def _places(form: Any, leaves: Iterator[Any], holder: Any = None, name: str = "") -> Iterator[Any]:
    """(the layer that holds it, its name there, tensor) of each tensor of an emptied cache."""
    if isinstance(form, _Slot):
        yield holder, name, next(leaves)
    elif isinstance(form, dict):
        for each in form.values():
            yield from _places(each, leaves, holder, name)
    elif isinstance(form, list | tuple):
        for each in form:
            yield from _places(each, leaves, holder, name)
    elif _is_cache(form):
        for key, each in vars(form).items():
            yield from _places(each, leaves, form, key)
