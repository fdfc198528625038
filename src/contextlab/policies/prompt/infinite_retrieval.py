"""Texts longer than a model reads: slide over them, and hold the sentences that the question looks at."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d

from contextlab.errors import InputError, check_whole
from contextlab.policies.core.ranking import in_order
from contextlab.policies.prompt.shorten import Head, ShortPrompt, _Observer, _real, observed
from contextlab.spec import describe


@torch.no_grad()
def infinite_retrieval(
    model: nn.Module,
    tokens: Tensor,
    ends: Tensor,
    question: Tensor,
    *,
    chunk: int = 1024,
    keep: int = 300,
    kernel: int = 9,
    heads: list[Head] | None = None,
    mask: Tensor | None = None,
) -> ShortPrompt:
    """The sentences of a long text that a question looks at, found chunk by chunk (InfiniRetri, 2502.12962).

    The text is read in chunks of whole sentences. Each step the model reads the sentences held so far, the next chunk
    and the question. A token's score is the attention that the question's tokens pay it, summed over them and the
    heads of the last layer, and over `kernel` neighbours, so that phrases count rather than single tokens. The
    sentences of the `keep` tokens of highest score are held for the next step; those held before must be among them
    again. Only token ids are held, and no state.

    Differs from the paper's code in that sentences are given by the caller, who knows the tokenizer, and that no
    prompt template stands around text and question: what belongs before the answer is put into the question.

    model: ours, or one of transformers, with softmax attention. tokens: [B, T] int64, the texts.
    ends: [B, T] bool, the last token of each sentence. A sentence of more than `chunk` tokens is read in parts.
    question: [B, Q] int64, without padding.
    chunk: the most tokens of the text that are read at once, beside those held; 1024 in the code.
    keep: tokens whose sentences are held; 300 in the code. kernel: neighbours, odd; the length of an answer, 8, there.
    heads: (layer, head) of each that is asked; default all of the last layer.
    mask: [B, T] bool, False at left padding.

    Returns the sentences held at the end, in order: put the question behind them, and let the model answer.
    """
    real = _real(tokens, mask)
    check_whole(chunk=(chunk, 1), keep=(keep, 1), kernel=(kernel, 1))
    if kernel % 2 == 0:
        raise InputError(f"kernel: expected an odd whole number, got {kernel}; the nearest is {kernel + 1}")
    if ends.dtype != torch.bool or ends.shape != tokens.shape:
        raise InputError(f"ends: expected bool {list(tokens.shape)}, as the text, got {describe(ends)}")
    batch, length = tokens.shape
    if question.ndim != 2 or len(question) != batch or question.dtype != tokens.dtype or not question.numel():
        raise InputError(f"question: expected token ids [{batch}, Q] int64, got {describe(question)}")
    if heads is None:
        last = _Observer.layers_of(model)[-1]
        heads = [(last.index, head) for head in range(last.heads)]
    at = torch.arange(length, device=tokens.device)
    sentence = ends.cumsum(1) - ends.long()  # of each token
    after = ((at + 1) * ends).cummax(1).values  # where the last sentence that has ended by a token ends
    place = length - real.sum(1)  # of the next token to read
    held = tokens.new_full((batch, 0), -1)  # places of the tokens held, rising, those of shorter rows after -1
    while bool((place < length).any()):
        rows = (place < length).nonzero()[:, 0]
        first = place[rows]
        most = (first + chunk).clamp_max(length)
        stop = after[rows, most - 1]
        stop = torch.where((most == length) | (stop <= first), most, stop)
        new = first[:, None] + torch.arange(chunk, device=tokens.device)
        seen = _trimmed(torch.cat((held[rows], new.masked_fill(new >= stop[:, None], -1)), 1))
        valid, index = seen >= 0, seen.clamp_min(0)
        text = torch.cat((tokens[rows].gather(1, index), question[rows]), 1)
        whole = torch.cat((valid, valid.new_ones(len(rows), question.shape[1])), 1)
        paid = observed(model, text, heads, question.shape[1], None if bool(valid.all()) else whole)
        score = avg_pool1d(paid[..., : seen.shape[1]].sum((1, 2))[:, None], kernel, 1, kernel // 2)[:, 0]
        best = in_order(score.masked_fill(~valid, float("-inf")), keep)
        of = sentence[rows].gather(1, index)
        wanted = torch.zeros(len(rows), length + 1, dtype=torch.bool, device=tokens.device)
        wanted.scatter_(1, of.gather(1, best).masked_fill(~valid.gather(1, best), length), True)
        kept = seen.masked_fill(~wanted.gather(1, of), -1)
        widened = held.new_full((batch, max(held.shape[1], kept.shape[1])), -1)
        widened[:, widened.shape[1] - held.shape[1] :] = held
        widened[rows] = -1
        widened[rows, widened.shape[1] - kept.shape[1] :] = kept
        held = _trimmed(widened)
        place = place.index_copy(0, rows, stop)
    there, index = held >= 0, held.clamp_min(0)
    return ShortPrompt(tokens.gather(1, index), None if bool(there.all()) else there, index)


def _trimmed(places: Tensor) -> Tensor:
    """Places [B, n], -1 for none, in order, with those that are none in front and no column of only these."""
    return places.sort(1).values[:, places.shape[1] - int((places >= 0).sum(1).max()) :]
