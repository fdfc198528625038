"""One of our models as a causal language model of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from contextlab.errors import InputError
from contextlab.models.build import build_model
from contextlab.models.io import require_own
from contextlab.models.packing import by_document
from contextlab.models.pretrained import files
from contextlab.models.pretrained.arguments import (
    check_positions,
    loss_of,
    mask_of,
    places_of,
    refuse_others,
    tokens_of,
)
from contextlab.models.pretrained.cache import CACHE, StateCache, one_cache
from contextlab.models.pretrained.config import ContextlabConfig
from contextlab.models.pretrained.generating import Generating
from contextlab.models.pretrained.headless import Headless
from contextlab.models.pretrained.packed import documents_of
from contextlab.models.pretrained.prefix import read_padded, tell_sizes
from contextlab.models.pretrained.reading import WHOLE, answers_whole, in_pieces
from contextlab.models.pretrained.resize import resize
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model, Within


class ContextlabForCausalLM(PreTrainedModel, Generating, GenerationMixin):
    """One of our models that reads tokens, as a causal language model of transformers.

    config: from `ContextlabConfig(spec)`; `ContextlabForCausalLM.of(model)` wraps a model that is there.

    Attribute read_in_pieces: int or None. Whole texts are read so many tokens at a time, so that under a policy
        their scores are those of what the policy keeps; None reads them at once, as the full cache would.

    Raises InputError for a model that does not predict the next token.
    """

    config_class = ContextlabConfig
    main_input_name = "input_ids"
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer then gives num_items_in_batch, and divides the loss by nothing itself

    def __init__(self, config: ContextlabConfig, model: Model | None = None) -> None:
        super().__init__(config)
        self.model = build_model(ModelSpec.parse(config.spec, "config.json: spec")) if model is None else model
        _check_next_token(self.model)
        tell_sizes(config, self.model)
        self.read_in_pieces: int | None = None
        self.gradient_checkpointing = False
        self._warned_whole = False

    @classmethod
    def of(cls, model: Model) -> ContextlabForCausalLM:
        """The model itself, wrapped (not copied)."""
        require_own(model, "of")
        wrapped = cls(ContextlabConfig(model.spec.model_dump(mode="json")), model)
        wrapped.train(model.training)
        return wrapped

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: StateCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        past_key_values: StateCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids: [B, T] int64. attention_mask: [B, T or all that was read], 0 at a row's padding, left or right.

        inputs_embeds: [B, T, D] in place of input_ids. position_ids: [B, T], the plain count of a row's tokens; where
        they begin again at 0 another document begins, which is answered as if it stood alone. cu_seq_lens_q [N + 1],
        cu_seq_lens_k, seq_idx [1, T], max_length_q, max_length_k: the same, as `DataCollatorWithFlattening` has it.
        cache or past_key_values, whatever the release of transformers: what `use_cache=True` returned for the tokens
        before, an empty StateCache(), or a DynamicCache of keys and values that stand before the text in each layer, as
        peft's prefix tuning gives it, where all layers keep theirs.
        labels: [B, T], -100 where none counts; the loss is the cross-entropy of the next token. shift_labels: the
        same, moved already. num_items_in_batch: what its sum is divided by, when a batch comes in pieces; None: the
        labels that count.
        logits_to_keep: so many last places, or these places [n]; 0: all. output_hidden_states: the embedded tokens
        and what each block made of them, the last one normed, [B, T, D] each. return_dict: False for a tuple.

        Raises InputError for a cache of another kind, and for an argument that would change the outcome here.
        """
        shifted: Tensor | None = others.pop("shift_labels", None)
        tokens, embedded = tokens_of(self.model, input_ids, inputs_embeds)
        before = one_cache(cache, past_key_values, self.model)
        read = 0 if before is None else before.get_seq_length()
        mask = mask_of(attention_mask, tokens, read)
        whole = not use_cache and before is None and self.read_in_pieces is None
        documents = documents_of(tokens, mask, position_ids, others, whole)
        if documents is None:
            check_positions(position_ids, attention_mask, mask, tokens, read, self.model)
        refuse_others(others)
        has_labels = labels is not None or shifted is not None
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        within = Within(embedded, hidden, places_of(logits_to_keep, has_labels))
        after = None
        if documents is not None:
            logits = by_document(self.model, tokens, documents, within)
        elif before is not None and before.prefix and mask is not None:
            if use_cache:
                raise InputError(
                    "attention_mask: after a prefix rows that are padded leave no cache; give use_cache=False"
                )
            assert before.state is not None
            logits = read_padded(self.model, tokens, before.state, mask, within)
        elif use_cache or before is not None:
            state = None if before is None else before.state
            logits, state = self.model.read(tokens, state, mask, within=within)
            after = StateCache(state) if before is None else before.after(state)
        elif self.read_in_pieces is not None:
            logits = in_pieces(self.model, self.read_in_pieces, tokens, mask, within)
        else:
            compiling = torch.compiler.is_compiling()
            if not self._warned_whole and not compiling and tokens.shape[1] > 1 and answers_whole(self.model):
                self._warned_whole = True
                warnings.warn(WHOLE, stacklevel=2)
            logits = self.model(tokens, mask, within=within)
        loss = loss_of(logits, labels, shifted, num_items_in_batch, documents) if has_labels else None
        handed_on: dict[str, Any] = {CACHE: after, "hidden_states": None if hidden is None else tuple(hidden)}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **handed_on)
        return output.to_tuple() if return_dict is False else output

    @property
    def base_model(self) -> Any:
        """The model without its head: called as `forward` is, it answers with `last_hidden_state` [B, T, D]."""
        return Headless(self)

    def get_decoder(self, *_: Any, **__: Any) -> Any:
        """The same as `base_model`."""
        return self.base_model

    def get_input_embeddings(self) -> Any:
        """The token embedding."""
        return self.model.read_in

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in the place of the model's own."""
        self.model.read_in = value

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.model.read_out

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another head in the place of the model's own."""
        self.model.read_out = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Another number of token ids, in embedding, head and configuration; the first ones keep their vectors.

        pad_to_multiple_of: round it up. mean_resizing: new ids start as the mean of the old, else at random.
        Returns the embedding.
        """
        count = self.model.spec.input_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None and isinstance(count, int):
            count = -(-count // pad_to_multiple_of) * pad_to_multiple_of
        if count != self.model.spec.input_size:
            resize(self.model, count or 0, mean_resizing)
            self.config.follow(self.model.spec.model_dump(mode="json"))
        return self.model.read_in

    def _set_gradient_checkpointing(  # type: ignore[override, unused-ignore]
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """What transformers' `gradient_checkpointing_enable` and `_disable` call."""
        self.gradient_checkpointing = enable
        self.model.recompute = gradient_checkpointing_func if enable else None
        self.model.recompute_every = every_n_layers

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **others: Any,
    ) -> None:
        """Write config.json, generation_config.json and the files of `contextlab.save_model`; other files stay.

        Tensors have the names of `state_dict()`, as Trainer's resumption wants. is_main_process: False writes nothing.
        state_dict: weights to be written in place of the model's own.

        Raises InputError for a keyword that we do not serve.
        """
        files.check_keywords("save_pretrained", others, files.SAVING, ("is_main_process", "state_dict"))
        if is_main_process:
            files.save(self, Path(save_directory), state_dict)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: ContextlabConfig | str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        output_loading_info: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        generation_config: GenerationConfig | None = None,
        subfolder: str = "",
        **others: Any,
    ) -> Any:
        """Read what `save_pretrained` or `contextlab.save_model` wrote, from a folder or the hub.

        dtype (or torch_dtype): of the weights; None or "auto" keeps the file's. device_map: one device.
        output_loading_info: also return what was missing or left over: nothing, else the folder is refused.
        state_dict: weights in place of the file's. others: fields of the configuration, keywords of the hub
        (cache_dir, force_download, local_files_only, revision, token).

        Raises InputError as `contextlab.load_model` does, and for a keyword that we do not serve.
        """
        others.pop("proxies", None)
        hub = {name: others.pop(name) for name in files.HUB if name in others}
        ours = {name: others.pop(name) for name in list(others) if name in files.LOADING}
        files.check_keywords("from_pretrained", ours, files.LOADING, files.SERVED_LOADING)
        wanted, device = files.dtype_of(dtype, torch_dtype), files.device_of(device_map)
        folder = files.folder_of(pretrained_model_name_or_path, subfolder, hub)
        model = files.model_in(folder, state_dict, wanted)
        config, left = files.config_in(folder, config, model, others)
        files.check_keywords("from_pretrained", left, files.LOADING, files.SERVED_LOADING)
        wrapped = cls(config, model if device is None else model.to(device))
        wrapped.eval()
        if device is not None:
            wrapped.__dict__["hf_device_map"] = {"": device}  # where transformers' own models say it
        wrapped.generation_config = generation_config or files.generation_in(folder, config)
        if not output_loading_info:
            return wrapped
        return wrapped, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: transformers would copy our sources into each folder that is saved; see `files.REMOTE`."""


def _check_next_token(model: Model) -> None:
    """Raises InputError for a model that does not predict the next token of what it reads."""
    if model.spec.read_in != "token":
        raise InputError("a language model reads tokens, and this one reads vectors (read_in: vector)")
    if model.spec.pool is not None:
        raise InputError(
            f"a language model predicts each next token, and this one answers a whole text once (pool: "
            f"{model.spec.pool}); contextlab.train trains it on tasks with one prediction a prompt"
        )
    for i, block in enumerate(model.blocks):
        if not block.mixer.causal:  # type: ignore[union-attr]
            raise InputError(
                f"a language model may not see the token that it is to predict, and block {i} "
                f"({type(block.mixer).__name__}) reads both ways; contextlab.train trains encoders on tasks with one "
                "prediction a prompt, and for the next token take a causal mixer, for example 'attention'"
            )
