"""How `generate` of transformers reads one of our models on."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.generation import GenerationMixin

from contextlab.errors import InputError
from contextlab.models.pretrained.cache import CACHE, StateCache, one_cache
from contextlab.spec import describe

ROLLBACK = "a guess that fails has to be unread, and a state cannot be cut back; leave it out"
# Options of transformers that would change something, the values that do not, and what to do instead.
NOT_SERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "cache_implementation": ((None, "dynamic"), "a model has states of its own; policies make them smaller"),
    "assistant_model": ((None,), ROLLBACK),
    "prompt_lookup_num_tokens": ((None,), ROLLBACK),
    "assistant_early_exit": ((None,), ROLLBACK),
}


class Generating(GenerationMixin):
    """`generate` of transformers, from a state that is handed on."""

    _is_stateful = True

    def generate(self, *args: Any, **options: Any) -> Any:
        """transformers' own `generate`; a cache is read on from under either of its names."""
        given = args[0] if args else options.get("inputs", options.get("input_ids"))
        if isinstance(given, Tensor) and given.ndim == 2 and not given.shape[1] and "inputs_embeds" not in options:
            raise InputError("generate: the prompt is empty; give at least one token, for example the id of <bos>")
        cache = one_cache(options.pop("cache", None), options.pop("past_key_values", None))
        asked = options.get("generation_config")
        for name, (plain, instead) in NOT_SERVED.items():
            value = options[name] if name in options else getattr(asked, name, None)
            if value not in plain:
                raise InputError(f"generate: {name}={describe(value)} is not taken: {instead}")
        if cache is None and (options.get("prefill_chunk_size") or getattr(asked, "prefill_chunk_size", None)):
            cache = StateCache()  # which the pieces of the prompt are read into
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
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """Only the tokens that the state has not read.

        input_ids, attention_mask, position_ids: [B, T]. inputs_embeds: [B, T, D], read in the first step.
        next_sequence_length: how many of the last these are, as transformers counts them; None: all.
        """
        if next_sequence_length is not None and next_sequence_length < 1:
            raise InputError(
                f"generate: the cache has read all {input_ids.shape[1]} tokens given; give those that follow, too"
            )
        before = one_cache(cache, past_key_values)
        given: dict[str, Any] = {}
        if inputs_embeds is not None and (before is None or not before.get_seq_length()):
            given["inputs_embeds"] = _last(inputs_embeds, next_sequence_length)
            length = given["inputs_embeds"].shape[1]
        else:
            given["input_ids"] = _last(input_ids, next_sequence_length)
            length = given["input_ids"].shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            _check_prompt(attention_mask, length)
        for name in ("logits_to_keep", "output_hidden_states", "output_attentions", "return_dict", "token_type_ids"):
            if others.get(name) is not None:
                given[name] = others[name]
        return {
            **given,
            "attention_mask": attention_mask,
            "position_ids": None if position_ids is None else _last(position_ids, length),
            "past_key_values": before,  # the name by which peft looks for it, whatever the release of transformers
            "use_cache": use_cache,
        }

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Refused: transformers' continuous batching keeps keys and values in pages of its own."""
        raise InputError("generate_batch: a model of contextlab keeps states of its own; call generate on each batch")

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Refused, as `generate_batch` is."""
        self.generate_batch()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _reorder_cache(self, cache: StateCache, beam_idx: Tensor) -> StateCache:
        cache.reorder_cache(beam_idx)
        return cache


def _last(x: Tensor, count: int | None) -> Tensor:
    return x if count is None else x[:, -count:]


def _check_prompt(mask: Tensor, length: int) -> None:
    """Raises InputError unless each row's tokens stand together at the end of the last `length` places.

    mask: [B, T], with what was read before.
    """
    piece = mask[:, -length:].bool()
    whole = piece[:, -1] & (piece[:, 1:] >= piece[:, :-1]).all(1)
    if bool(whole.all()):
        return
    row = int((~whole).nonzero()[0])
    if not bool(mask[row].any()):
        raise InputError(f"generate: row {row} of the prompt is padding only; give it a token")
    where = "between its tokens" if bool(piece[row, -1]) else "on the right"
    raise InputError(
        f"generate: row {row} of the prompt is padded {where}; pad on the left (tokenizer.padding_side = 'left'), and "
        "give attention_mask where the padding id is a token of the prompt"
    )
