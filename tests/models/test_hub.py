"""Hugging Face checkpoints with our surface: transformers' logits, the laws of states, and plain refusals."""

from __future__ import annotations

import json

import pytest
import torch

from contextlab.errors import InputError
from contextlab.evaluation import cost
from contextlab.models import Model, build_model, load, load_tokenizer, save_model
from contextlab.models.hub import build_checkpoint, describe_checkpoint
from contextlab.models.hub_model import HuggingFaceModel

from .checkpoints import CONFIGS, V, checkpoint, reference

transformers = pytest.importorskip("transformers", minversion="5")

# Where transformers computes in float32 inside a float64 model, it is that exact.
TOLERANCE = {"gpt2": 1e-12, "llama": 1e-12, "mistral": 1e-12, "qwen2": 1e-12, "qwen3": 1e-12}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_and_states_are_right(kind, tmp_path):
    theirs = checkpoint(kind, tmp_path)
    ours = load(tmp_path, dtype=torch.float64)
    assert isinstance(ours, HuggingFaceModel)
    tokens = torch.randint(3, V, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=2e-6 if "gemma" in kind else 1e-12)
        state, read, early = None, [], None
        for piece in tokens.split([9, 1, 1, 6, 3], dim=1):
            logits, state = ours.read(piece, state)
            read.append(logits)
            early = state if early is None else early
        atol = TOLERANCE.get(kind, 2e-6)
        torch.testing.assert_close(torch.cat(read, 1), expected, rtol=0, atol=atol)
        again, _ = ours.read(tokens[:, 9:10], early)  # the state handed in before is still good
        torch.testing.assert_close(again, expected[:, 9:10], rtol=0, atol=atol)
        picked, _ = ours.read(tokens[[1]][:, 9:10], early.select(torch.tensor([1])))
        torch.testing.assert_close(picked, expected[[1]][:, 9:10], rtol=0, atol=atol)
    assert state.length == 20
    assert state.nbytes == ours.state_nbytes(20, batch=2)
    assert 0 < ours.flops(16) < ours.flops(32)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bytes_are_foretold_at_five_lengths(kind):
    ours = HuggingFaceModel(reference(kind))
    with torch.no_grad():
        for length in (1, 4, 6, 13, 24):
            _, state = ours.read(torch.randint(3, V, (2, length)))
            assert state.nbytes == ours.state_nbytes(length, batch=2)


def test_a_state_that_grows_by_no_rule_is_not_foretold(monkeypatch):
    ours = HuggingFaceModel(reference("llama"))
    sizes = ours._sizes

    def odd(length):
        return [(place, size + (length == 3)) for place, size in sizes(length)]

    monkeypatch.setattr(ours, "_sizes", odd)
    with pytest.raises(InputError, match=r"layers\.\d\.\w+ grows by no rule that is known .*take state\.nbytes"):
        ours.state_nbytes(10)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind, side):
    # Where softmax of a fully masked row is made in float32 from float64 masks, transformers gives NaN: float32 then.
    dtype = torch.float32 if kind == "gemma2" else torch.float64
    model = HuggingFaceModel(reference(kind, dtype))
    tokens = torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(0))
    row, place = [torch.zeros(1, 5, dtype=torch.int64), tokens[:1, :7]], torch.arange(12)[None]
    mask = place >= torch.tensor([[5], [0]]) if side == "left" else place < torch.tensor([[7], [12]])
    padded = torch.cat(row if side == "left" else row[::-1], 1)
    with torch.no_grad():
        together, state = model.read(torch.cat([padded, tokens[1:]]), mask=mask)
        alone, alone_state = model.read(tokens[:1, :7])
        torch.testing.assert_close(together[:1][mask[:1]], alone[0], rtol=0, atol=2e-6)
        after, _ = model.read(tokens[:, 7:8], state)
        expected, _ = model.read(tokens[:1, 7:8], alone_state)
    torch.testing.assert_close(after[:1], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_left_padding_read_in_pieces_changes_nothing(kind):
    """Cuts within the padding, single tokens of it, and rows that begin within a piece."""
    model = HuggingFaceModel(reference(kind, torch.float32 if kind == "gemma2" else torch.float64))
    tokens = torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12)[None] >= torch.tensor([[5], [0]])
    both = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.int64), tokens[:1, :7]], 1), tokens[1:]])
    with torch.no_grad():
        alone, _ = model.read(tokens[:1, :7])
        for sizes in ([3, 9], [1, 1, 2, 1, 7]):
            read, state = [], None
            for piece, there in zip(both.split(sizes, 1), mask.split(sizes, 1), strict=True):
                logits, state = model.read(piece, state, there)
                read.append(logits)
            torch.testing.assert_close(torch.cat(read, 1)[:1, 5:], alone, rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", ["llama", "mamba2", "rwkv"])
def test_generation_is_that_of_transformers(kind):
    theirs = reference(kind)
    tokens = torch.randint(3, V, (1, 6), generator=torch.Generator().manual_seed(1))
    expected = theirs.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(HuggingFaceModel(theirs).generate(tokens, 6), expected[:, 6:])


def test_our_own_folders_are_loaded_too(tmp_path):
    model = build_model("samba", width=16, read_in="token", input_size=9, output_size=9).double()
    save_model(model, tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert isinstance(again, Model)
    assert next(again.parameters()).dtype == torch.float64
    tokens = torch.randint(9, (1, 5))
    assert torch.equal(again(tokens), model(tokens))
    assert load_tokenizer(tmp_path / "ours").decode(load_tokenizer(tmp_path / "ours").encode("né")) == "né"


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_a_saved_model_is_loaded_in_the_dtype_that_is_asked_for(dtype, tmp_path):
    save_model(build_model("transformer", width=8, depth=1, heads=1, input_size=2, output_size=1), tmp_path / "own")
    found = {each.dtype for each in load(tmp_path / "own", dtype=dtype).parameters()}
    assert found == {torch.float32 if dtype is None else dtype}


def test_costs_of_a_checkpoint_are_measured(tmp_path):
    checkpoint("llama", tmp_path, torch.float32)
    spec = describe_checkpoint(tmp_path)
    assert build_checkpoint(spec).parameter_count == load(tmp_path).parameter_count
    table = cost(spec, [32], repeats=1).set_index(["metric", "length"])["value"]
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, key heads, head size, bytes
    assert table["state_bytes", 32] == 32 * per_token + 8  # and how many tokens were read
    assert table["decode_seconds_per_token", 32] > 0


def test_nan_in_inference_is_named():
    model = HuggingFaceModel(reference("llama", torch.float32))
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad():
        weight = model.model.model.layers[1].mlp.up_proj.weight
        kept = weight.clone()
        weight[0, 0] = torch.nan
        with pytest.raises(InputError, match=r"parameter 'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN"):
            model.read(tokens)
        weight.copy_(kept)
        for matrix in (model.model.model.layers[1].mlp.up_proj, model.model.model.layers[1].mlp.down_proj):
            matrix.weight.fill_(3e38)
        with pytest.raises(InputError, match=r"layer 'model\.layers\.1' gives NaN or infinity"):
            model.read(tokens)


def test_a_state_of_another_batch_or_model_is_refused():
    model = HuggingFaceModel(reference("llama"))
    _, state = model.read(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="the state has 2 rows, the tokens have 3"):
        model.read(torch.zeros(3, 1, dtype=torch.int64), state)
    _, other = build_model("lstm", read_in="token", input_size=9, output_size=9).read(torch.zeros(2, 3).long())
    with pytest.raises(InputError, match="expected the state of a Hugging Face model, got ModelState"):
        model.read(torch.zeros(2, 1, dtype=torch.int64), other)


def test_a_decoder_deeper_than_its_cache_is_refused():
    bart = transformers.BartConfig(vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=2, decoder_ffn_dim=16)
    with pytest.raises(InputError, match="its decoder has 2 layers, but transformers makes a cache of 1"):
        HuggingFaceModel(transformers.BartForCausalLM(bart))
    bart.encoder_layers = 2
    _, state = HuggingFaceModel(transformers.BartForCausalLM(bart)).read(torch.ones(1, 3, dtype=torch.int64))
    assert state.length == 3


def rewritten(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_missing_extra_and_misshapen_tensors_are_listed(tmp_path):
    checkpoint("llama", tmp_path, torch.float32)

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.nrom.weight"] = torch.zeros(32)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(7, 32)

    rewritten(tmp_path, change)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "missing: model.norm.weight" in message
    assert "extra: model.nrom.weight" in message
    assert "of another shape: model.layers.1.mlp.up_proj.weight is [7, 32], expected [48, 32]" in message
    assert "\n" not in message


def test_a_checkpoint_that_is_cut_short_is_refused_in_one_line(tmp_path):
    checkpoint("llama", tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (0, 7, 100, len(whole) // 2):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(InputError) as error:
            load(tmp_path, native=True)
        assert "\n" not in str(error.value)


def test_pickles_unknown_types_and_empty_folders_are_refused(tmp_path):
    checkpoint("llama", tmp_path / "pickled", torch.float32)
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        load(tmp_path / "pickled")
    (tmp_path / "pickled/pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"no weights there \(expected \*\.safetensors\)"):
        load(tmp_path / "pickled")
    checkpoint("llama", tmp_path / "unknown", torch.float32)
    config = json.loads((tmp_path / "unknown/config.json").read_text())
    (tmp_path / "unknown/config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    with pytest.raises(InputError, match="of type 'lama'; the nearest that is known is 'llama'"):
        load(tmp_path / "unknown")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no model there \(expected config\.json"):
        load(tmp_path / "empty")
    with pytest.raises(InputError, match="neither a folder nor a hub name"):
        load("no/such/folder")


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match="no such folder, and the hub gave no checkpoint") as caught:
        load("someone/some-model")
    assert "\n" not in str(caught.value)


def test_no_bar_of_transformers_is_shown_and_theirs_are_left_as_they_were(tmp_path, capfd):
    checkpoint("llama", tmp_path)
    transformers.logging.enable_progress_bar()
    capfd.readouterr()
    load(tmp_path)
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    assert (shown, capfd.readouterr().err) == (True, "")
