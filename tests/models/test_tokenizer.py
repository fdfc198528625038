"""Bytes there and back, and the tokenizer of a checkpoint's folder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contextlab.errors import InputError
from contextlab.models import ByteTokenizer, load_tokenizer


@given(st.text())
def test_every_text_comes_back(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.int64
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_that_are_no_text_and_ids_that_are_no_bytes():
    assert ByteTokenizer().decode(torch.tensor([104, 255])) == "h\ufffd"
    with pytest.raises(InputError, match="a byte is 0 to 255, got 256"):
        ByteTokenizer().decode(torch.tensor([1, 256]))


def test_a_checkpoints_own_tokenizer_is_taken(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    tokenizers = pytest.importorskip("tokenizers")
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("b a c") == [1, 0, 2]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path)
