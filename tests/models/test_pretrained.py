"""Our models under transformers: AutoModelForCausalLM, generate, save_pretrained and from_pretrained."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.models import Model, build_model, load
from contextlab.policies import build_policy

from .checkpoints import cache_of

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


@pytest.fixture
def lengths(wrapped, monkeypatch):
    """The tokens of each call of the model within, as the test goes on; whole sequences read without a state, too."""
    seen = []
    for name in ("read", "forward"):
        call = getattr(wrapped.model, name)
        monkeypatch.setattr(
            wrapped.model, name, lambda ids, *rest, call=call: (seen.append(ids.shape[1]), call(ids, *rest))[1]
        )
    return seen


GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def plain_loop(model, tokens, count):
    """Greedy decoding from the model's own states."""
    logits, state = model.read(tokens)
    for _ in range(count):
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
        logits, state = model.read(tokens[:, -1:], state)
    return tokens


def test_generate_reads_each_token_once(wrapped, lengths):
    written = wrapped.generate(TOKENS, max_new_tokens=5, **GREEDY)
    assert lengths == [6, 1, 1, 1, 1]
    assert torch.equal(written, plain_loop(wrapped.model, TOKENS, 5))
    assert torch.equal(written[:, 6:], wrapped.model.generate(TOKENS, 5))


def test_generate_under_a_policy_is_reading_on_under_it():
    from contextlab.models.pretrained import ContextlabForCausalLM

    wrapped = ContextlabForCausalLM.of(
        build_model("transformer", width=16, depth=2, heads=2, read_in="token", input_size=31, output_size=31).eval()
    )
    x = torch.randint(1, 31, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), build_policy("streaming_llm", budget="12tok", window=4).attach(wrapped):
        expected = plain_loop(wrapped.model, x, 12)
        assert torch.equal(wrapped.generate(x, max_new_tokens=12, **GREEDY), expected)
    assert not torch.equal(wrapped.generate(x, max_new_tokens=12, **GREEDY), expected)  # the policy counts


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_read_on_from_under_either_name(wrapped, lengths, name):
    expected = wrapped(TOKENS).logits
    first = wrapped(TOKENS[:, :4], use_cache=True)
    second = wrapped(TOKENS[:, 4:], **{name: cache_of(first)})
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), expected, rtol=0, atol=1e-5)
    assert lengths == [6, 4, 2]
    assert (cache_of(first).get_seq_length(), cache_of(second).get_seq_length()) == (4, 6)
    assert not torch.allclose(second.logits, wrapped(TOKENS[:, 4:]).logits, atol=0.1)
    with pytest.raises(InputError, match="two names of one argument"):
        wrapped(TOKENS, cache=cache_of(first), past_key_values=cache_of(first))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_goes_on_from_a_cache(wrapped, lengths, name):
    expected = plain_loop(wrapped.model, TOKENS, 4)
    for given in (TOKENS, TOKENS[:, 4:]):  # the whole sequence, or the new tokens with the mask over all
        cache = cache_of(wrapped(TOKENS[:, :4], use_cache=True))
        lengths.clear()
        mask = torch.ones_like(TOKENS)
        on = wrapped.generate(given, attention_mask=mask, max_new_tokens=4, **{name: cache}, **GREEDY)
        assert torch.equal(on[:, -4:], expected[:, -4:])
        assert lengths == [2, 1, 1, 1]
        assert cache.get_seq_length() == 4
    cache = cache_of(wrapped(TOKENS, use_cache=True))
    with pytest.raises(InputError, match="has read all 6 tokens"):
        wrapped.generate(TOKENS, max_new_tokens=4, **{name: cache}, **GREEDY)


def test_a_prompt_is_read_in_pieces(wrapped, lengths):
    from contextlab.models.pretrained import StateCache

    options = {"prefill_chunk_size": 4, "max_new_tokens": 3, **GREEDY}
    written = wrapped.generate(TOKENS, cache=StateCache(), **options)
    assert lengths == [4, 2, 1, 1]
    assert torch.equal(written, plain_loop(wrapped.model, TOKENS, 3))


def test_what_would_be_left_out_without_a_word_is_refused(wrapped):
    zeros, places = torch.zeros_like(TOKENS), torch.arange(6).expand(2, 6)
    plain = wrapped(TOKENS, token_type_ids=zeros, output_attentions=False, return_dict=True, inputs_embeds=None)
    assert torch.equal(plain.logits, wrapped(TOKENS).logits)
    for name, value in {"position_ids": places, "output_hidden_states": True, "past": 3}.items():
        with pytest.raises(InputError, match=f"{name}: .* do not take it"):
            wrapped(TOKENS, **{name: value})
    for cache in (transformers.DynamicCache(), ()):
        with pytest.raises(InputError, match="expected what use_cache=True returned, got a"):
            wrapped(TOKENS, cache=cache)


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
    whole = wrapped(TOKENS, labels=labels, num_items_in_batch=6).loss
    parts = [
        wrapped(t, labels=n, num_items_in_batch=6).loss for t, n in zip(TOKENS[:, None], labels[:, None], strict=True)
    ]
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(sum(parts), expected)


def test_padding_at_the_right_is_that_of_each_row_alone_and_within_a_row_refused(wrapped):
    right = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    alone = wrapped(TOKENS[:1, :4], use_cache=True)
    for cached in (False, True):
        read = wrapped(TOKENS, attention_mask=right, use_cache=cached)
        torch.testing.assert_close(read.logits[:1, :4], alone.logits)
        torch.testing.assert_close(read.logits[1:], wrapped(TOKENS[1:]).logits)
    after = wrapped(TOKENS[:, :1], past_key_values=cache_of(read)).logits
    expected = wrapped(TOKENS[:1, :1], past_key_values=cache_of(alone)).logits
    torch.testing.assert_close(after[:1], expected)
    with pytest.raises(InputError, match="row 0 has padding between its tokens"):
        wrapped(TOKENS, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1], [1] * 6]))


def test_models_of_vectors_are_refused():
    from contextlab.models.pretrained import ContextlabForCausalLM

    with pytest.raises(InputError, match="reads tokens, and this one reads vectors"):
        ContextlabForCausalLM.of(build_model("lstm", input_size=3, output_size=1))
