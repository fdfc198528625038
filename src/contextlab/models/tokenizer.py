"""Text to token ids: bytes, or the tokenizer that lies in a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError, ResourceError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


class ByteTokenizer:
    """One token a byte of UTF-8: ids 0 to 255, nothing to download, every text can be written."""

    vocab_size = 256

    def encode(self, text: str | bytes) -> Tensor:
        """[T] int64 of the bytes of `text`."""
        data = text.encode() if isinstance(text, str) else text
        return torch.tensor(list(data), dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """The text of ids [T]; bytes that are no UTF-8 become U+FFFD. Raises InputError on ids beyond 255."""
        values = ids.tolist()
        if any(not 0 <= value < 256 for value in values):
            raise InputError(f"decode: a byte is 0 to 255, got {next(v for v in values if not 0 <= v < 256)}")
        return bytes(values).decode(errors="replace")


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a checkpoint's folder, by `transformers.AutoTokenizer`; a ByteTokenizer when it holds none."""
    if not any((Path(folder) / name).exists() for name in FILES):
        return ByteTokenizer()
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ResourceError("a checkpoint's tokenizer needs transformers; pip install 'contextlab[hf]'") from None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{folder}: the tokenizer cannot be read ({str(error).splitlines()[0]})") from error
