"""Our models as `transformers` models: `AutoModelForCausalLM`, `model.generate`, `save_pretrained`, `from_pretrained`.

Importing this module registers the model type "contextlab"; it needs the package `transformers`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from contextlab.compat import cache_name
from contextlab.errors import InputError
from contextlab.models.io import load_model, save_model
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model, ModelState, build_model


class ContextlabConfig(PretrainedConfig):
    """A ModelSpec as a configuration of transformers. spec: the keys of a ModelSpec."""

    model_type = "contextlab"

    def __init__(self, spec: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.spec = dict(spec or {})
        super().__init__(**{"tie_word_embeddings": False, **kwargs})
        self.vocab_size = self.spec.get("output_size")
        self.hidden_size = self.spec.get("width")
        self.num_hidden_layers = self.spec.get("depth")


CACHE: Any = cache_name(field.name for field in dataclasses.fields(CausalLMOutputWithPast))
"""What the installed transformers calls the cache of an output, and hands on from step to step of `generate`."""


class StateCache:
    """A `ModelState` where transformers expects a cache.

    It never changes but by `reorder_cache`: each call of the model returns another.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # it counts the tokens read, as caches of attention do

    def __init__(self, state: ModelState | None = None) -> None:
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return 0 if self.state is None else self.state.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, for beam search. beam_idx: [B] int64."""
        if self.state is not None:
            self.state = self.state.select(beam_idx)


class ContextlabForCausalLM(PreTrainedModel, GenerationMixin):
    """One of our models that reads tokens, as a causal language model of transformers.

    config: from `ContextlabConfig(spec)`; `ContextlabForCausalLM.of(model)` wraps a model that is there.
    """

    config_class = ContextlabConfig
    main_input_name = "input_ids"
    base_model_prefix = "model"
    _is_stateful = True

    def __init__(self, config: ContextlabConfig, model: Model | None = None) -> None:
        super().__init__(config)
        self.model = build_model(ModelSpec.parse(config.spec, "config.json: spec")) if model is None else model
        if self.model.spec.read_in != "token":
            raise InputError("a language model reads tokens, and this one reads vectors (read_in: vector)")

    @classmethod
    def of(cls, model: Model) -> ContextlabForCausalLM:
        """The model itself, wrapped (not copied)."""
        wrapped = cls(ContextlabConfig(model.spec.model_dump(mode="json")), model)
        wrapped.train(model.training)
        return wrapped

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: StateCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        past_key_values: StateCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids: [B, T] int64. attention_mask: [B, T or all that was read], 0 at a row's padding, left or right.

        cache or past_key_values, whatever the release of transformers: what `use_cache=True` returned for the tokens
        before. labels: [B, T], -100 where none counts; the loss is the cross-entropy of the next token.
        num_items_in_batch: what its sum is divided by, when a batch comes in pieces; None: the labels that count.

        Raises InputError for a cache of another kind, and for an argument that would change the outcome here.
        """
        _refuse_others(others)
        before = _one_cache(cache, past_key_values)
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, -input_ids.shape[1] :].bool()
            mask = None if bool(mask.all()) else mask
        if use_cache or before is not None:
            logits, after = self.model.read(input_ids, None if before is None else before.state, mask)
            kept = StateCache(after)
        else:
            logits, kept = self.model(input_ids, mask), None
        handed_on: dict[str, Any] = {CACHE: kept}
        loss = None
        if labels is not None:
            scored, due = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            if num_items_in_batch is None:
                loss = F.cross_entropy(scored, due, ignore_index=-100)
            else:
                loss = F.cross_entropy(scored, due, ignore_index=-100, reduction="sum") / num_items_in_batch
        return CausalLMOutputWithPast(loss=loss, logits=logits, **handed_on)

    def generate(self, *args: Any, **options: Any) -> Any:
        """transformers' own `generate`; a cache is read on from under either of its names."""
        cache = _one_cache(options.pop("cache", None), options.pop("past_key_values", None))
        if cache is not None:
            options[CACHE] = cache
        theirs: Any = GenerationMixin.generate
        return theirs(self, *args, **options)

    def prepare_inputs_for_generation(  # type: ignore[override, unused-ignore]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: StateCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: StateCache | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Only the tokens that the state has not read.

        input_ids, attention_mask: [B, T].
        next_sequence_length: how many of the last these are, as transformers counts them; None: all.
        """
        if next_sequence_length is not None:
            if next_sequence_length < 1:
                raise InputError(
                    f"generate: the cache has read all {input_ids.shape[1]} tokens given; give those that follow, too"
                )
            input_ids = input_ids[:, -next_sequence_length:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "cache": _one_cache(cache, past_key_values),
            "use_cache": use_cache,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _reorder_cache(self, cache: StateCache, beam_idx: Tensor) -> StateCache:
        cache.reorder_cache(beam_idx)
        return cache

    def get_input_embeddings(self) -> Any:
        """The token embedding."""
        return self.model.read_in

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Write config.json, generation_config.json and the files of `contextlab.save_model` into the folder."""
        folder = save_model(self.model, save_directory)
        self.config.architectures = [type(self).__name__]
        self.config.dtype = next(self.model.parameters()).dtype
        self.config.save_pretrained(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *_: Any, dtype: torch.dtype | str | None = None, **kwargs: Any
    ) -> ContextlabForCausalLM:
        """Read what `save_pretrained` wrote. dtype: of the weights; None or "auto" keeps the file's."""
        folder = Path(pretrained_model_name_or_path)
        model = load_model(folder)
        if isinstance(dtype, torch.dtype):
            model = model.to(dtype)
        wrapped = cls.of(model.eval())
        if (folder / "generation_config.json").exists():
            wrapped.generation_config = GenerationConfig.from_pretrained(folder)
        return wrapped


def _one_cache(cache: StateCache | None, past_key_values: StateCache | None) -> StateCache | None:
    """The cache, under whichever of its two names it came."""
    if cache is not None and past_key_values is not None:
        raise InputError("cache and past_key_values are two names of one argument; give one of them")
    found = past_key_values if cache is None else cache
    if found is not None and not isinstance(found, StateCache):
        raise InputError(
            f"cache: expected what use_cache=True returned, got a {type(found).__name__}; leave it out at the start"
        )
    return found


def _refuse_others(others: dict[str, Any]) -> None:
    """Raises InputError for an argument with a value that would have to change something."""
    for name, value in others.items():
        asked = bool(value.any()) if isinstance(value, Tensor) else bool(value)  # token_type_ids are zeros, say
        if asked and name != "return_dict":
            raise InputError(f"{name}: our models under transformers do not take it; leave it out")


AutoConfig.register("contextlab", ContextlabConfig, exist_ok=True)
AutoModelForCausalLM.register(ContextlabConfig, ContextlabForCausalLM, exist_ok=True)
