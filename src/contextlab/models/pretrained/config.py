"""A ModelSpec as a configuration of transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

UNLIMITED = 1 << 20
"""`max_position_embeddings` of a model whose positions have no end; programs that cut texts ask for a number."""


class ContextlabConfig(PretrainedConfig):
    """A ModelSpec as a configuration of transformers.

    spec: the keys of a ModelSpec. others: fields of transformers (`eos_token_id`, ...) or of the user's own.
    """

    model_type = "contextlab"

    def __init__(self, spec: dict[str, Any] | None = None, **others: Any) -> None:
        longest = others.pop("max_position_embeddings", None)
        super().__init__(**{"tie_word_embeddings": False, **others})
        self.max_position_embeddings = longest
        self.follow(spec or {})

    def follow(self, spec: dict[str, Any]) -> None:
        """Set what follows from a spec: its sizes, by transformers' names, and the longest sequence."""
        self.spec = dict(spec)
        self.vocab_size = self.spec.get("output_size")
        self.hidden_size = self.spec.get("width")
        self.num_hidden_layers = self.spec.get("depth")
        self.num_attention_heads = self.spec.get("heads")
        if self.spec.get("position") == "learned":
            self.max_position_embeddings = self.spec.get("max_length")
        elif self.max_position_embeddings is None:
            self.max_position_embeddings = UNLIMITED

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: transformers would copy our sources into each folder that is saved; see `files.REMOTE`."""
