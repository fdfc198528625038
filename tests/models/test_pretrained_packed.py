"""Packed documents as programs of transformers give them: each answered, and scored, as if it stood alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab import build_model
from contextlab.errors import InputError

transformers = pytest.importorskip("transformers")

LENGTHS = (5, 1, 9, 3)
GENERATOR = torch.Generator().manual_seed(0)
DOCUMENTS = [torch.randint(31, (length,), generator=GENERATOR) for length in LENGTHS]
ROW = torch.cat(DOCUMENTS)[None]
ENDS = torch.tensor([0, 5, 6, 15, 18])


@pytest.fixture
def wrapped():
    from contextlab.models.pretrained import ContextlabForCausalLM

    model = build_model("samba", width=16, depth=2, heads=2, read_in="token", input_size=31, output_size=31, seed=3)
    return ContextlabForCausalLM.of(model.double().eval())


@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens_q", "seq_idx", "all"])
def test_what_the_collator_gives(wrapped, told):
    """Logits and gradients; the loss is the mean over the tokens that follow another of their own document."""
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": document.tolist()} for document in DOCUMENTS])
    assert batch["input_ids"].equal(ROW)
    if told != "all":
        batch = {key: batch[key] for key in ("input_ids", "labels", told)}
    output = wrapped(**batch)
    alone = [wrapped(document[None]).logits[0] for document in DOCUMENTS]
    torch.testing.assert_close(output.logits[0], torch.cat(alone), rtol=1e-9, atol=1e-9)
    scored = torch.cat([logits[:-1] for logits in alone])
    loss = F.cross_entropy(scored, torch.cat([document[1:] for document in DOCUMENTS]))
    torch.testing.assert_close(output.loss, loss, rtol=1e-9, atol=1e-9)
    wanted = list(wrapped.parameters())
    found, due = (torch.autograd.grad(each, wanted) for each in (output.loss, loss))
    torch.testing.assert_close(found, due, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("labels", ["labels", "shift_labels"])
def test_the_first_token_of_a_document_is_never_scored_from_the_one_before(wrapped, labels):
    """Also where the labels hold it."""
    due = ROW if labels == "labels" else F.pad(ROW, (0, 1), value=-100)[:, 1:]
    found = wrapped(ROW, cu_seq_lens_q=ENDS, **{labels: due}).loss
    scored = torch.cat([wrapped(document[None]).logits[0, :-1] for document in DOCUMENTS])
    torch.testing.assert_close(found, F.cross_entropy(scored, torch.cat([d[1:] for d in DOCUMENTS])))


def test_rows_with_padding_hidden_vectors_and_embeddings(wrapped):
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    plain = wrapped(ROW, position_ids=places, output_hidden_states=True, logits_to_keep=3)
    alone = [wrapped(document[None], output_hidden_states=True) for document in DOCUMENTS]
    for layer, hidden in enumerate(plain.hidden_states):
        each = torch.cat([output.hidden_states[layer] for output in alone], 1)
        torch.testing.assert_close(hidden, each, rtol=1e-9, atol=1e-9)
    assert plain.logits.shape == (1, 3, 31)
    vectors = wrapped.get_input_embeddings()(ROW)
    embedded = wrapped(inputs_embeds=vectors, position_ids=places).logits
    torch.testing.assert_close(embedded[:, -3:], plain.logits, rtol=1e-9, atol=1e-9)
    padded = F.pad(ROW, (2, 0))
    mask = F.pad(torch.ones_like(ROW), (2, 0))
    found = wrapped(padded, attention_mask=mask, position_ids=F.pad(places, (2, 0), value=1)).logits[:, 2:]
    torch.testing.assert_close(found, embedded, rtol=1e-9, atol=1e-9)


def test_what_does_not_go_with_packed_documents_is_refused(wrapped):
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    for message, call in {
        "position_ids that begin again: packed documents are read at once": lambda: wrapped(
            ROW, position_ids=places, use_cache=True
        ),
        "cu_seq_lens_q: packed documents are read at once": lambda: wrapped(ROW, cu_seq_lens_q=ENDS, use_cache=True),
        "cu_seq_lens_q, cu_seq_lens_k: they part the row at different tokens": lambda: wrapped(
            ROW, cu_seq_lens_q=ENDS, cu_seq_lens_k=ENDS[[0, 2, 4]]
        ),
        "position_ids: they begin again at other tokens": lambda: wrapped(
            ROW, cu_seq_lens_q=ENDS, position_ids=torch.arange(18)[None]
        ),
        r"seq_idx: expected \[1, T\] beside the tokens \[1, 18\], got \[1, 17\]": lambda: wrapped(
            ROW, seq_idx=places[:, 1:]
        ),
        "cu_seqlens: expected the 18 tokens of the row last, got 15": lambda: wrapped(ROW, cu_seq_lens_q=ENDS[:-1]),
        "position_ids: expected a count of each row's tokens": lambda: wrapped(ROW, position_ids=places + 2),
    }.items():
        with pytest.raises(InputError, match=f"^{message}"):
            call()
