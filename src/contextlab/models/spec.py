"""ModelSpec: a stack of blocks as data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from contextlab import registry
from contextlab.errors import InputError
from contextlab.mixers.base import head_size
from contextlab.spec import Spec

MlpKind = Literal["gelu", "swiglu", "relu2", "none"]


class LayerSpec(Spec):
    """One entry of a model's repeating pattern. A plain mixer name stands for `{mixer: name}`.

    mixer: the registered name of the token mixer.
    options: the mixer's options.
    mlp: this layer's MLP; None takes the model's.
    """

    mixer: str
    options: dict[str, Any] = Field(default_factory=dict)
    mlp: MlpKind | None = None

    @model_validator(mode="after")
    def _known(self) -> LayerSpec:
        registry.lookup("mixer", self.mixer).check(self.options, path="options", given=("width",))
        return self


class ModelSpec(Spec):
    """A stack of blocks (mixer + MLP) with a read-in and a read-out.

    width: D, the size of a token's vector inside the model.
    depth: number of blocks; the pattern `layers` is repeated until there are so many.
    heads: heads of every mixer that has heads, unless its options say otherwise.
    layers: the repeating pattern of mixers.
    mlp: kind of the MLP after each mixer.
    mlp_ratio: hidden width of the MLP over `width`.
    norm: normalisation before each mixer and MLP and before the read-out.
    position: "rope" and "alibi" are given to the mixers that know them; "learned" and "sinusoidal" are added
        to the embedded tokens; "none" leaves order to the causal mask and the recurrences.
    max_length: longest sequence with learned positions.
    loops: times that the whole stack is applied (looped models, 2311.12424).
    input_injection: add the embedded input again before each loop.
    read_in: "vector" for tokens of floats, "token" for token ids.
    input_size: width of an input vector, or number of token ids; the task fills it in when None.
    output_size: width of a prediction; the task fills it in when None.
    tied: use the token embedding as the read-out.
    """

    width: PositiveInt = 64
    depth: PositiveInt = 4
    heads: PositiveInt = 4
    layers: tuple[LayerSpec, ...] = Field(default=(LayerSpec.model_construct(mixer="attention", options={}, mlp=None),))
    mlp: MlpKind = "gelu"
    mlp_ratio: PositiveFloat = 4.0
    norm: Literal["rms", "layer", "none"] = "rms"
    position: Literal["rope", "alibi", "learned", "sinusoidal", "none"] = "rope"
    max_length: PositiveInt | None = None
    loops: PositiveInt = 1
    input_injection: bool = True
    read_in: Literal["vector", "token"] = "vector"
    input_size: PositiveInt | None = None
    output_size: PositiveInt | None = None
    tied: bool = False

    @field_validator("layers", mode="before")
    @classmethod
    def _names_are_layers(cls, layers: Any) -> Any:
        if isinstance(layers, str):
            layers = [layers]
        if isinstance(layers, list | tuple):
            return tuple({"mixer": layer} if isinstance(layer, str) else layer for layer in layers)
        return layers

    @model_validator(mode="after")
    def _possible(self) -> ModelSpec:
        if not self.layers:
            raise InputError("layers: expected at least one mixer, for example [attention]")
        for layer in self.layers:
            knows_heads = any(p.name == "heads" for p in registry.lookup("mixer", layer.mixer).parameters)
            if knows_heads and "heads" not in layer.options and "head_dim" not in layer.options:
                head_size(self.width, self.heads)
        if self.position == "learned" and self.max_length is None:
            raise InputError("max_length: learned positions need it; give the longest sequence, for example 512")
        if self.tied and self.read_in != "token":
            raise InputError("tied: only a model that reads tokens has an embedding to tie; set read_in to 'token'")
        if self.tied and self.input_size is not None and self.output_size not in (None, self.input_size):
            raise InputError(
                f"tied: input_size {self.input_size} and output_size {self.output_size} must be equal to share weights"
            )
        return self

    def pattern(self) -> list[LayerSpec]:
        """The layers in order, the pattern repeated to `depth`."""
        return [self.layers[i % len(self.layers)] for i in range(self.depth)]

    def for_task(self, task: Any) -> ModelSpec:
        """This spec with read-in and sizes set to the task's. Raises InputError when it says otherwise already."""
        wanted = {"read_in": task.read_in, "input_size": task.input_size, "output_size": task.output_size}
        for name in ("input_size", "output_size"):
            given = getattr(self, name)
            if given is not None and given != wanted[name]:
                raise InputError(f"{name}: the model has {given}, but the task needs {wanted[name]}")
        return ModelSpec.parse({**self.model_dump(), **wanted})
