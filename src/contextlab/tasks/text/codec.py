"""Text to token ids and back: bytes, a tokenizer by name, or any object with `encode` and `decode`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from contextlab.errors import InputError
from contextlab.spec import describe
from contextlab.tokenizer import find_tokenizer


@runtime_checkable
class Tokenizer(Protocol):
    """What tasks ask of a tokenizer; those of transformers and of tokenizers, and ByteTokenizer, have it."""

    def encode(self, text: str, /) -> Any:
        """The ids of a text: a list, a tensor, or an object with `ids`."""

    def decode(self, ids: Any, /) -> str:
        """The text of ids."""


PIECES = (" the", "-fox", ":", " 42", ".\n", "\nIs", " it", "?")
"""Text as tasks cut it: at spaces and at punctuation."""


class Codec:
    """A tokenizer as tasks use it: lists of ids, no special tokens, a known number of ids.

    tokenizer: None for the bytes of UTF-8, ids 0 to 255.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.size = 256 if tokenizer is None else _size(tokenizer)
        self._batched = _batched(tokenizer)
        self._plain = tokenizer is not None and _takes_special(tokenizer)

    @property
    def is_bytes(self) -> bool:
        return self.tokenizer is None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens; at once where the tokenizer can do that."""
        if self.tokenizer is None:
            return [list(text.encode()) for text in texts]
        if self._batched is not None:
            return [found.ids for found in self._batched.encode_batch(list(texts), add_special_tokens=False)]
        given: Any = self.tokenizer
        options = {"add_special_tokens": False} if self._plain else {}
        return [_listed(given.encode(text, **options)) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        if self.tokenizer is None:
            return bytes(ids).decode(errors="replace")
        return str((self._batched or self.tokenizer).decode(list(ids)))

    def require(self, symbols: str) -> None:
        """Refuse a tokenizer that cannot write `symbols`, or that changes text which is encoded piece by piece."""
        if self.tokenizer is None:
            return
        back = self.decode(self.encode(symbols))
        if missing := [s for s in dict.fromkeys(symbols) if s not in back and not s.isspace()]:
            raise InputError(
                f"the tokenizer cannot write {''.join(missing)[:20]!r}, which this task's prompts hold: "
                "choose one whose vocabulary has them, or tokenizer=null for bytes"
            )
        text = "".join(PIECES)
        back = self.decode(token for ids in self.encode_all(PIECES) for token in ids)
        if back != text:
            raise InputError(
                f"the tokenizer changes text that is joined from pieces ({text!r} became {back!r}): choose "
                "one that works on bytes, such as those of GPT-2, Llama 3 and Qwen, or tokenizer=null for bytes"
            )


_codecs: dict[int, Codec] = {}


def codec(tokenizer: Any) -> Codec:
    """The codec of a task's `tokenizer` option, one a tokenizer.

    tokenizer: None for bytes, the path of a folder with a tokenizer, a name on the Hugging Face hub, or a `Tokenizer`.
    Raises InputError on what is none of these.
    """
    if isinstance(tokenizer, str):
        tokenizer = find_tokenizer(tokenizer)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise InputError(
            "tokenizer: expected null (None) for bytes, a folder that holds tokenizer.json, a name on the Hugging Face "
            f"hub, or an object with encode and decode, got {describe(tokenizer)}"
        )
    found = _codecs.get(id(tokenizer))
    if found is None or found.tokenizer is not tokenizer:
        found = _codecs[id(tokenizer)] = Codec(tokenizer)
    return found


def _listed(ids: Any) -> list[int]:
    ids = getattr(ids, "ids", ids)
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)


def _batched(tokenizer: Any) -> Any:
    """A copy of a tokenizer of the package tokenizers, also of one inside transformers', that never cuts or pads."""
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not (hasattr(inner, "encode_batch") and hasattr(inner, "to_str")):
        return None
    copy = type(inner).from_str(inner.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _size(tokenizer: Any) -> int:
    """Ids that the tokenizer can give, added tokens included."""
    if hasattr(tokenizer, "get_vocab_size"):
        return int(tokenizer.get_vocab_size())
    if hasattr(tokenizer, "__len__"):
        return len(tokenizer)
    if hasattr(tokenizer, "vocab_size"):
        return int(tokenizer.vocab_size)
    raise InputError(f"tokenizer: {type(tokenizer).__name__} does not say its size (vocab_size, or len)")


def _takes_special(tokenizer: Any) -> bool:
    try:
        return "add_special_tokens" in inspect.signature(tokenizer.encode).parameters
    except ValueError:  # a compiled method without a signature
        return False
