"""Our models under transformers: AutoModelForCausalLM, generate, save_pretrained and from_pretrained."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.models import Model, build_model, load

transformers = pytest.importorskip("transformers", minversion="5")


@pytest.fixture
def wrapped():
    from contextlab.models.pretrained import ContextlabForCausalLM

    model = build_model("samba", width=16, depth=2, heads=2, read_in="token", input_size=31, output_size=31, seed=3)
    return ContextlabForCausalLM.of(model.eval())


TOKENS = torch.randint(31, (2, 6), generator=torch.Generator().manual_seed(0))


def test_a_model_comes_back_as_it_went(wrapped, tmp_path):
    wrapped.generation_config.max_new_tokens = 7
    wrapped.save_pretrained(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(again) is type(wrapped)
    assert torch.equal(again(TOKENS).logits, wrapped(TOKENS).logits)
    assert again.generation_config.max_new_tokens == 7
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert half.model.read_out.weight.dtype == torch.bfloat16
    assert isinstance(load(tmp_path / "model"), Model)


def test_tied_models_come_back_tied(tmp_path):
    from contextlab.models.pretrained import ContextlabForCausalLM

    tied = build_model("transformer", width=16, read_in="token", input_size=9, output_size=9, tied=True)
    ContextlabForCausalLM.of(tied).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).model
    assert again.read_out.weight is again.read_in.weight
    assert torch.equal(again.read_in.weight, tied.read_in.weight)


def test_generate_reads_each_token_once(wrapped, monkeypatch):
    read, seen = wrapped.model.read, []
    monkeypatch.setattr(wrapped.model, "read", lambda ids, *rest: (seen.append(ids.shape[1]), read(ids, *rest))[1])
    written = wrapped.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    monkeypatch.undo()
    assert torch.equal(written[:, 6:], wrapped.model.generate(TOKENS, 5))
    assert seen == [6, 1, 1, 1, 1]


def test_generate_minds_left_padding_and_beams(wrapped):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    written = wrapped.generate(TOKENS, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(written[:1, 6:], wrapped.model.generate(TOKENS[:1, 2:], 5))
    beams = wrapped.generate(TOKENS, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0)

    def likelihood(sequence):
        logits = wrapped(sequence).logits[:, 5:-1].log_softmax(-1)
        return logits.gather(-1, sequence[:, 6:, None]).sum((1, 2))

    greedy = wrapped.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert (likelihood(beams) >= likelihood(greedy) - 1e-5).all()


def test_the_loss_is_the_cross_entropy_of_the_next_token(wrapped):
    labels = TOKENS.clone()
    labels[:, :3] = -100
    output = wrapped(TOKENS, labels=labels)
    expected = F.cross_entropy(output.logits[:, 2:-1].flatten(0, 1), TOKENS[:, 3:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_padding_at_the_right_is_let_be_and_within_a_row_refused(wrapped):
    right = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    assert torch.equal(wrapped(TOKENS, attention_mask=right).logits, wrapped(TOKENS).logits)
    with pytest.raises(InputError, match="not within it"):
        wrapped(TOKENS, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1], [1] * 6]))


def test_models_of_vectors_are_refused():
    from contextlab.models.pretrained import ContextlabForCausalLM

    with pytest.raises(InputError, match="reads tokens, and this one reads vectors"):
        ContextlabForCausalLM.of(build_model("lstm", input_size=3, output_size=1))
