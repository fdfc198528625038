"""ModelSpec: a stack of blocks as data."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from contextlab import registry
from contextlab.errors import InputError, unknown
from contextlab.mixers.base import head_size
from contextlab.models.constructed import ConstructionSpec
from contextlab.models.exits import ExitSpec
from contextlab.models.skip import SkipSpec
from contextlab.spec import Spec, describe, refuse_counts

MOST_LAYERS = 10_000
"""Layers that a model may apply to a token, depth x loops. Each costs about 25 KB and a millisecond before it has a
parameter; the deepest networks that were trained have 10,000 (1806.05393)."""

MOST_WIDTH = 1 << 20
"""Of a model: a square matrix of it takes 4 TiB."""


def check_layers(depth: object, loops: object = 1) -> None:
    """Refuse more layers than a model may have, before any is made. Other types than int are left to the spec.

    Raises InputError.
    """
    if not (isinstance(depth, int) and isinstance(loops, int)) or min(depth, loops) < 1:
        return
    if depth * loops > MOST_LAYERS:
        most = f"depth of at most {MOST_LAYERS // loops}" if loops <= MOST_LAYERS else f"loops of at most {MOST_LAYERS}"
        raise InputError(
            f"depth {describe(depth)} x loops {describe(loops)}: a model applies at most {MOST_LAYERS} layers; use "
            + most
        )


class MlpSpec(Spec):
    """An MLP after a mixer. A plain name stands for `{kind: name}`.

    kind: the registered name of the MLP, or "none".
    options: the MLP's options; `ratio` is the model's `mlp_ratio` unless given.
    """

    kind: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> MlpSpec:
        if self.kind == "none":
            if self.options:
                raise InputError("options: an MLP of kind 'none' has none; leave them out or name a kind")
        elif self.kind not in registry.names("mlp"):
            raise InputError(unknown("mlp", self.kind, ["none", *registry.names("mlp")]))
        else:
            registry.lookup("mlp", self.kind).check(self.options, path="options", given=("width",))
        return self


OF_KEYS = (
    "heads", "kv_heads", "head_dim", "position", "rope_base", "rope_fraction", "rope_scaling", "xpos_scale",
)  # fmt: skip
"""Options in which two layers must agree to share keys."""


class LayerSpec(Spec):
    """One entry of a model's repeating pattern. A plain mixer name stands for `{mixer: name}`.

    mixer: the registered name of the token mixer, or "none": the block is its MLP alone.
    options: the mixer's options.
    mlp: this layer's MLP; None takes the model's.
    kv: "shared" makes an attention layer read the keys and values of the nearest attention layer below that makes its
        own (cross-layer attention, 2405.12981; YOCO, 2405.05254); it keeps no state.
    share: layers with the same name here are one and the same layer, used several times, with a state for each use.
    with_input: the layer reads the model's embedded input beside the hidden vector, as Zamba's global layers do
        (2405.16712): x + L MLP(norm(mixer(norm([x, input])))), with an L for each use; the mixer is twice as wide.
    skip: only some tokens go through the layer, the others past it (Mixture-of-Depths, 2404.02258): {share, ahead}, or
        the share alone. Its state is of those that went through.
    """

    mixer: str
    options: dict[str, Any] = Field(default_factory=dict)
    mlp: MlpSpec | None = None
    kv: Literal["own", "shared"] = "own"
    share: str | None = None
    with_input: bool = False
    skip: SkipSpec | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `skip` where there is none, as in the files of before there was."""
        data: dict[str, Any] = handler(self)
        if "skip" in data and self.skip is None:
            del data["skip"]
        return data

    @field_validator("skip", mode="before")
    @classmethod
    def _number_is_share(cls, skip: Any) -> Any:
        return {"share": skip} if isinstance(skip, int | float) and not isinstance(skip, bool) else skip

    @field_validator("mlp", mode="before")
    @classmethod
    def _name_is_kind(cls, mlp: Any) -> Any:
        return {"kind": mlp} if isinstance(mlp, str) else mlp

    @model_validator(mode="after")
    def _known(self) -> LayerSpec:
        if self.mixer == "none":
            if self.options or self.kv == "shared" or self.with_input:
                raise InputError("mixer: 'none' has no options, no keys and no with_input; leave them out")
            return self
        if self.mixer not in registry.names("mixer"):
            raise InputError(unknown("mixer", self.mixer, ["none", *registry.names("mixer")]))
        registry.lookup("mixer", self.mixer).check(self.options, path="options", given=("width",))
        if self.kv == "shared" and (self.mixer != "attention" or self.with_input or self.options.get("short_conv")):
            raise InputError(
                "kv: only a layer of mixer 'attention', without short_conv and with_input, can read another's keys"
            )
        if self.skip is not None and (self.kv == "shared" or self.with_input):
            raise InputError("skip: not for a layer that reads another's keys or the model's input; leave one out")
        if self.skip is not None and not registry.lookup("mixer", self.mixer).factory.causal:  # type: ignore[attr-defined]
            raise InputError(f"skip: {self.mixer!r} reads both ways; take a causal mixer, for example 'attention'")
        return self


class LinearSpec(Spec):
    """How the weights of some linear layers are stored.

    layers: the layers' names in the model, such as "blocks.0.mlp.up"; "*" stands for any letters: "blocks.*.mlp.*", or
        "*" for every linear layer of mixers and MLPs. The read-in and the read-out, which are no part of these, are
        meant only by a name that begins with "read_".
    form: a registered form (`contextlab list linears`), or "dense" for layers that stay as they are.
    options: the form's options.
    """

    layers: str
    form: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> LinearSpec:
        if self.form == "dense":
            if self.options:
                raise InputError("options: the form 'dense' has none; leave them out or name another form")
        elif self.form not in registry.names("linear"):
            raise InputError(unknown("linear form", self.form, ["dense", *registry.names("linear")]))
        else:
            for name in ("inputs", "outputs", "bias"):
                if name in self.options:
                    raise InputError(f"options: {name} is the layer's own; leave it out")
            given = ("inputs", "outputs", "bias")
            entry = registry.lookup("linear", self.form)
            checked = entry.check(self.options, path="options", given=given)
            with torch.device("meta"):  # forms within forms check their own options where they are made
                entry.factory(inputs=8, outputs=8, bias=False, **checked)
        return self


class ModelSpec(Spec):
    """A stack of blocks (mixer + MLP) with a read-in and a read-out.

    width: D, the size of a token's vector inside the model.
    depth: number of blocks; the pattern `layers` is repeated until there are so many.
    heads: heads of every mixer that has heads, unless its options say otherwise.
    layers: the repeating pattern of mixers.
    mlp: the MLP after each mixer, by name (`contextlab list mlps`), "none", or {kind, options}.
    mlp_ratio: hidden width of the MLP over `width`.
    block: "sequential" is mixer, then MLP; "parallel" adds both to the same input at once (GPT-J, PaLM).
    residual: "plain" is f(x) + x; with the learned weights and low-rank maps of LAuReL (2411.07501): "laurel_rw" is
        a f(x) + b x, "laurel_lr" f(x) + x + B A x, "laurel" a f(x) + b (x + B A x). "none" is f(x), for mixers that
        carry the token on by themselves (shaped_attention; 2311.01906).
    residual_rank: rank of B A.
    atoms: make the attention projections of all "attention" layers from so many matrices that they share (MASA,
        2508.04581); None for matrices of their own.
    norm: normalisation before each mixer and MLP and before the read-out.
    norm_eps: added to the mean square before the root; None takes PyTorch's default.
    position: "rope", "xpos" and "alibi" are given to the mixers that know them (rope in place of xpos to those that do
        not); "learned" and "sinusoidal" are added to the embedded tokens; "none" leaves order to the causal mask and
        the recurrences.
    max_length: longest sequence with learned positions.
    loops: times that the whole stack is applied (looped models, 2311.12424).
    input_injection: add the embedded input again before each loop.
    read_in: "vector" for tokens of floats, "token" for token ids.
    input_size: width of an input vector, or number of token ids; the task fills it in when None.
    output_size: width of a prediction; the task fills it in when None.
    tied: use the token embedding as the read-out.
    read_out_bias: whether the read-out has a bias; a tied one never has.
    pool: one prediction for the whole sequence, from the mean, the first or the last of its tokens, or from a
        mean with learned weights ("attention", LAMA 1912.00835); None for one prediction a token.
    linear: how the weights of linear layers are stored; of entries that name a layer the first counts.
    exit: when a token goes no further up the stack (CALM, 2207.07061); None: all go through all layers.
    construction: what writes a fresh model's weights down; None: they are drawn. A model that is made has its weights,
        and its spec no longer says where they are from.
    """

    width: PositiveInt = 64
    depth: PositiveInt = 4
    heads: PositiveInt = 4
    layers: tuple[LayerSpec, ...] = Field(default=(LayerSpec.model_construct(mixer="attention", options={}),))
    mlp: MlpSpec = MlpSpec.model_construct(kind="gelu", options={})
    mlp_ratio: PositiveFloat = 4.0
    block: Literal["sequential", "parallel"] = "sequential"
    residual: Literal["plain", "laurel_rw", "laurel_lr", "laurel", "none"] = "plain"
    residual_rank: PositiveInt = 8
    atoms: PositiveInt | None = None
    norm: Literal["rms", "layer", "none"] = "rms"
    norm_eps: PositiveFloat | None = None
    position: Literal["rope", "xpos", "alibi", "learned", "sinusoidal", "none"] = "rope"
    max_length: PositiveInt | None = None
    loops: PositiveInt = 1
    input_injection: bool = True
    read_in: Literal["vector", "token"] = "vector"
    input_size: PositiveInt | None = None
    output_size: PositiveInt | None = None
    tied: bool = False
    read_out_bias: bool = True
    pool: Literal["mean", "first", "last", "attention"] | None = None
    linear: tuple[LinearSpec, ...] = ()
    exit: ExitSpec | None = None
    construction: ConstructionSpec | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `linear`, `exit` and `construction` where there are none, as in the files of before there were."""
        data: dict[str, Any] = handler(self)
        for name in ("linear", "exit", "construction"):
            if name in data and not getattr(self, name):
                del data[name]
        return data

    @field_validator("mlp", mode="before")
    @classmethod
    def _name_is_kind(cls, mlp: Any) -> Any:
        return {"kind": mlp} if isinstance(mlp, str) else mlp

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
        check_layers(self.depth, self.loops)
        refuse_counts("width", self.width, MOST_WIDTH)
        if not self.layers:
            raise InputError("layers: expected at least one mixer, for example [attention]")
        if self.residual == "none" and any(layer.mixer == "none" for layer in self.layers):
            raise InputError("residual: 'none' leaves nothing of a token that no mixer carries on; use 'plain'")
        if self.residual == "none" and any(layer.skip is not None for layer in self.layers):
            raise InputError("skip: tokens go past a layer by the residual stream, and residual 'none' has none")
        for layer in (layer for layer in self.layers if layer.mixer != "none"):
            knows_heads = any(p.name == "heads" for p in registry.lookup("mixer", layer.mixer).parameters)
            if knows_heads and "heads" not in layer.options and "head_dim" not in layer.options:
                head_size(self.width * (1 + layer.with_input), self.heads)
        self.sources()
        if self.position == "learned" and self.max_length is None:
            raise InputError("max_length: learned positions need it; give the longest sequence, for example 512")
        if self.tied and self.pool is not None:
            raise InputError("tied: a pooled read-out has a matrix of its own; leave out tied or pool")
        if self.tied and self.read_in != "token":
            raise InputError("tied: only a model that reads tokens has an embedding to tie; set read_in to 'token'")
        if self.tied and self.input_size is not None and self.output_size not in (None, self.input_size):
            raise InputError(
                f"tied: input_size {self.input_size} and output_size {self.output_size} must be equal to share weights"
            )
        self._check_exit()
        if self.construction is not None:
            self.construction.check(self)
        return self

    def _check_exit(self) -> None:
        if self.exit is None:
            return
        if self.reads_whole:
            raise InputError("exit: tokens leave one by one, in models that read forward and do not pool; leave it out")
        if self.exit.by == "softmax" and self.read_in != "token":
            raise InputError(
                "exit.by: the predictions of a model that reads vectors are no logits; set read_in to 'token', or take "
                "'saturation'"
            )
        if self.exit.first > self.depth * self.loops:
            raise InputError(f"exit.first: at most the model's {self.depth * self.loops} layers, got {self.exit.first}")

    @property
    def made(self) -> ModelSpec:
        """The spec as a model that is made has it: its weights are its own, whatever wrote them."""
        return self if self.construction is None else self.model_copy(update={"construction": None})

    @property
    def counts_padding(self) -> bool:
        """Whether the state tells how much each row was padded: the model asks for tokens' places in their texts."""
        decays = self.exit is not None and self.exit.decay is not None
        return decays or self.position in ("learned", "sinusoidal")

    def pattern(self) -> list[LayerSpec]:
        """The layers in order, the pattern repeated to `depth`."""
        return [self.layers[i % len(self.layers)] for i in range(self.depth)]

    def sources(self) -> list[int]:
        """For each layer the layer whose keys and values it reads: its own, or those of the nearest that makes them.

        Raises InputError when there is none, or when the two layers' options do not fit together.
        """
        found: list[int] = []
        below: int | None = None  # the nearest attention layer so far that makes its own
        pattern = self.pattern()
        for index, layer in enumerate(pattern):
            if layer.kv == "own":
                found.append(index)
                if layer.mixer == "attention" and not layer.with_input:
                    below = index
                continue
            if below is None:
                raise InputError(
                    f"layers: layer {index} reads shared keys, but no attention layer below it makes its own"
                )
            other = pattern[below]
            for name in OF_KEYS:
                if layer.options.get(name, other.options.get(name)) != other.options.get(name):
                    raise InputError(
                        f"layers: layer {index} reads the keys of layer {below}, so its {name} cannot be "
                        f"{layer.options[name]!r} (that of layer {below}: {other.options.get(name)!r})"
                    )
            if other.options.get("short_conv") or other.skip is not None:
                why = "made by short_conv" if other.skip is None else "which some tokens skip"
                raise InputError(f"layers: layer {index} cannot read the keys of layer {below}, {why}")
            found.append(below)
        return found

    @property
    def both_ways(self) -> str | None:
        """The first mixer that sees later tokens; None where all read forward."""
        mixers = (layer.mixer for layer in self.pattern()[: len(self.layers)] if layer.mixer != "none")
        return next((name for name in mixers if not registry.lookup("mixer", name).factory.causal), None)  # type: ignore[attr-defined]

    @property
    def reads_whole(self) -> bool:
        """Whether it sees later tokens or pools: it then answers whole sequences only, and hands no state on."""
        return self.pool is not None or self.both_ways is not None

    def check_one_prediction(self, task: Any) -> None:
        """Raises InputError where this model reads prompts whole, and the task scores more than one prediction each."""
        if getattr(task, "one_prediction", False) or not self.reads_whole:
            return
        entries = registry.entries("task")
        serve = ", ".join(entry.name for entry in entries if getattr(entry.factory, "one_prediction", False))
        if self.pool is not None:
            what, choice = f"pool: a model with pool {self.pool!r} predicts once a prompt", "leave pool out"
        else:
            what = f"layers: {self.both_ways!r} reads both ways and would see the answers"
            choice = "take causal mixers, for example 'attention'"
        raise InputError(f"{what}; {choice}, or a task that scores one prediction a prompt ({serve})")

    def for_task(self, task: Any) -> ModelSpec:
        """This spec with read-in and sizes set to the task's. Raises InputError when it says otherwise already."""
        if self.construction is not None:
            self.construction.made().check_task(task)
        self.check_one_prediction(task)
        wanted = {"read_in": task.read_in, "input_size": task.input_size, "output_size": task.output_size}
        for name in ("input_size", "output_size"):
            given = getattr(self, name)
            if given is not None and given != wanted[name]:
                raise InputError(f"{name}: the model has {given}, but the task needs {wanted[name]}")
        return ModelSpec.parse({**self.model_dump(), **wanted})
