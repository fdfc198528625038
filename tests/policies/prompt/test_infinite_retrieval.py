"""Infinite retrieval against its definition, row by row and sentence by sentence, and on a head that finds a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models import build_model, load
from contextlab.policies import infinite_retrieval
from contextlab.policies.prompt.shorten import observed
from tests.policies.prompt.test_shorten import masked, model, tokens

STOP = 0


def naive(
    reader: Any, text: list[int], question: list[int], chunk: int, keep: int, kernel: int, heads: Any
) -> list[int]:
    """The places of the tokens that are held at the end, of one text whose sentences end with STOP."""
    number, sentence_of = 0, []
    for token in text:
        sentence_of.append(number)
        number += token == STOP
    held: list[int] = []
    first = 0
    while first < len(text):
        stop = min(first + chunk, len(text))
        if stop < len(text):  # back to the end of a sentence, if there is one
            whole = [t + 1 for t in range(first, stop) if text[t] == STOP]
            stop = whole[-1] if whole else stop
        seen = held + list(range(first, stop))
        ids = torch.tensor([[text[t] for t in seen] + question])
        weights = observed(reader, ids, heads, len(question))[0, :, :, : len(seen)]
        each = [float(weights[:, :, i].sum()) for i in range(len(seen))]
        half = kernel // 2
        phrase = [sum(each[max(0, i - half) : i + half + 1]) for i in range(len(seen))]
        best = sorted(range(len(seen)), key=lambda i: (-phrase[i], -i))[:keep]
        wanted = {sentence_of[seen[i]] for i in best}
        held = [t for t in seen if sentence_of[t] in wanted]
        first = stop
    return held


@pytest.mark.parametrize(
    ("chunk", "keep", "kernel", "heads"),
    [(12, 2, 3, None), (25, 4, 5, None), (7, 1, 1, [(0, 2), (1, 1)]), (60, 3, 3, None), (3, 2, 3, None)],
)
def test_the_sentences_of_the_best_phrases_are_held(chunk: int, keep: int, kernel: int, heads: Any) -> None:
    reader, x, question, pads = model(), tokens(3, 60), tokens(3, 5, seed=1), (0, 9, 31)
    short = infinite_retrieval(
        reader, x, x == STOP, question, chunk=chunk, keep=keep, kernel=kernel, heads=heads, mask=masked(x, pads)
    )
    asked = heads or [(2, head) for head in range(4)]
    for row, pad in enumerate(pads):
        expected = naive(reader, x[row, pad:].tolist(), question[row].tolist(), chunk, keep, kernel, asked)
        there = torch.ones_like(short.index[row], dtype=torch.bool) if short.mask is None else short.mask[row]
        assert short.index[row, there].tolist() == [pad + t for t in expected]
        assert torch.equal(short.tokens[row, there], x[row, pad:][expected])
        assert there.tolist() == sorted(there.tolist())


@torch.no_grad()
def test_a_chunk_that_ends_with_a_sentence_is_read_whole() -> None:
    reader, x, question = model(), tokens(2, 60).clamp_min(1), tokens(2, 5, seed=1)
    x[:, 5::6] = STOP
    short = infinite_retrieval(reader, x, x == STOP, question, chunk=12, keep=2, kernel=3)
    for row in range(2):
        asked = [(2, head) for head in range(4)]
        expected = naive(reader, x[row].tolist(), question[row].tolist(), 12, 2, 3, asked)
        there = torch.ones(short.index.shape[1], dtype=torch.bool) if short.mask is None else short.mask[row]
        assert short.index[row, there].tolist() == expected


@torch.no_grad()
def test_a_sentence_is_found_wherever_it_stands_in_a_long_text() -> None:
    """Head 2 of the last layer looks for token 7: its sentence is held to the end, and little else."""
    reader = model("none", depth=2, bias=True)
    mixer, block = reader.blocks[1].mixer, reader.blocks[1]
    for each in reader.blocks[0].parameters():
        each.zero_()  # layer 1 sees the embeddings
    sought = block.mixer_norm(reader.read_in.weight[7])
    mixer.qkv_proj.weight[16:24] = 0.0  # head 2 asks always the same ..
    mixer.qkv_proj.bias[16:24] = 10.0
    mixer.qkv_proj.weight[32 + 16 : 32 + 24] = sought / sought.norm()  # .. and answers as far as a token is like 7
    x = tokens(6, 600, seed=3)
    x[x == 7] = 3
    at = torch.arange(6) * 110 + 20
    x[torch.arange(6), at] = 7
    short = infinite_retrieval(reader, x, x == STOP, tokens(6, 4), chunk=40, keep=2, kernel=1, heads=[(1, 2)])
    assert bool((short.tokens == 7).any(1).all())
    for row in range(6):
        ends = (x[row] == STOP).nonzero()[:, 0].tolist()
        first = max([e + 1 for e in ends if e < at[row]], default=0)
        last = min([e for e in ends if e >= at[row]], default=599)
        there = short.index[row] if short.mask is None else short.index[row, short.mask[row]]
        assert set(range(first, last + 1)) <= set(there.tolist())
        assert len(there) < 200
    other = infinite_retrieval(reader, x, x == STOP, tokens(6, 4), chunk=40, keep=2, kernel=1, heads=[(1, 0)])
    assert not bool((other.tokens == 7).any(1).all())


def test_everything_is_held_where_all_tokens_are_kept() -> None:
    reader, x = model(), tokens(2, 30)
    short = infinite_retrieval(reader, x, x == STOP, tokens(2, 3), chunk=8, keep=30)
    assert short.mask is None
    assert torch.equal(short.tokens, x)


def test_hugging_face_models_find_what_our_import_of_their_weights_finds(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.models.checkpoints import checkpoint

    checkpoint("llama", tmp_path)
    x, question = tokens(2, 50), tokens(2, 4, seed=1)
    found: list[Tensor] = []
    for reader in (load(tmp_path), load(tmp_path, native=True)):
        short = infinite_retrieval(reader, x, x == STOP, question, chunk=20, keep=3, kernel=3, mask=masked(x, (0, 11)))
        found.append(short.tokens)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"chunk": 0}, "chunk: expected a whole number of at least 1"),
        ({"keep": 0}, "keep: expected a whole number of at least 1"),
        ({"kernel": 4}, "kernel: expected an odd whole number, got 4; the nearest is 5"),
        ({"ends": torch.ones(2, 3, dtype=torch.bool)}, r"ends: expected bool \[2, 40\], as the text"),
        ({"question": torch.ones(1, 3, dtype=torch.int64)}, r"question: expected token ids \[2, Q\] int64"),
        ({"heads": [(9, 0)]}, r"\(9, 0\) is no head of the model"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    x = tokens()
    given: dict[str, Any] = {"ends": x == STOP, "question": tokens(2, 3), **wrong}
    with pytest.raises(InputError, match=message):
        infinite_retrieval(model(), x, given.pop("ends"), given.pop("question"), **given)


def test_a_model_without_attention_is_refused() -> None:
    linear = build_model("gated_delta_net", width=32, depth=1, input_size=20, output_size=20, read_in="token")
    x = tokens()
    with pytest.raises(InputError, match="needs a model with a KV state"):
        infinite_retrieval(linear, x, x == STOP, tokens(2, 3))
