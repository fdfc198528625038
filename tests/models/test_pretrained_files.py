"""Our models under transformers: what save_pretrained writes and from_pretrained reads, keyword by keyword."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from contextlab.errors import InputError
from contextlab.models import build_model, load_model, save_model

transformers = pytest.importorskip("transformers", minversion="5")

TOKENS = torch.randint(31, (2, 6), generator=torch.Generator().manual_seed(0))
SIZES = {"width": 16, "depth": 1, "heads": 2, "read_in": "token", "input_size": 31, "output_size": 31}


def build(**options):
    from contextlab.models.pretrained import ContextlabForCausalLM

    return ContextlabForCausalLM.of(build_model("transformer", **{**SIZES, **options}).eval())


@pytest.fixture
def wrapped():
    return build()


def test_names_on_disk_are_those_in_memory(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert set(written) == set(wrapped.state_dict())
    fresh = build(mlp_ratio=4.0)
    torch.nn.init.zeros_(fresh.model.read_in.weight)
    assert not any(fresh.load_state_dict(written, strict=False))  # as Trainer resumes: no name missing, none unknown
    assert torch.equal(fresh(TOKENS).logits, wrapped(TOKENS).logits)
    assert torch.equal(load_model(tmp_path)(TOKENS), wrapped(TOKENS).logits)


def test_folders_of_save_model_load_in_either_way(wrapped, tmp_path):
    save_model(wrapped.model, tmp_path)  # names without the prefix, no config.json
    again = type(wrapped).from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).logits, wrapped(TOKENS).logits)
    assert again.config.vocab_size == 31


def test_saving_leaves_other_files_alone(wrapped, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"theirs")
    (tmp_path / "tokenizer.json").write_text("{}")
    wrapped.save_pretrained(tmp_path)
    wrapped.save_pretrained(str(tmp_path))  # again, over its own files
    assert (tmp_path / "checkpoint-3" / "model.safetensors").read_bytes() == b"theirs"
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_the_configuration_keeps_what_it_holds(tmp_path):
    wrapped = build(position="learned", max_length=24)
    assert wrapped.config.max_position_embeddings == 24
    wrapped.config.eos_token_id = wrapped.generation_config.eos_token_id = 7
    wrapped.config.our_field = {"a": [1, 2]}
    wrapped.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.config.eos_token_id, again.generation_config.eos_token_id) == (7, 7)
    assert again.config.our_field == {"a": [1, 2]}
    assert again.name_or_path == again.config._name_or_path == str(tmp_path)
    assert again.config.max_position_embeddings == 24
    assert build().config.max_position_embeddings >= 1 << 20  # rotary positions have no end
    changed = type(wrapped).from_pretrained(tmp_path, eos_token_id=9)
    assert changed.config.eos_token_id == 9
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_a_process_that_has_imported_nothing_of_ours_loads_the_folder(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words(), unk_token="[UNK]").save_pretrained(tmp_path)
    script = f"""
import sys, transformers
assert "contextlab" not in sys.modules
try:
    transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code ran that nobody trusted")
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
pipe = transformers.pipeline("text-generation", model={str(tmp_path)!r}, trust_remote_code=True)
print(type(model).__module__, pipe("w3 w5", max_new_tokens=4, do_sample=False, return_full_text=False))
pipe.model.save_pretrained({str(tmp_path / "again")!r})
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = wrapped.generate(torch.tensor([[3, 5]]), max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 2:]
    module, answer = done.stdout.strip().splitlines()[-1].split(" ", 1)
    assert module == "contextlab.models.pretrained.causal_lm"
    assert answer == repr([{"generated_text": " ".join(f"w{i}" for i in ours.tolist())}])
    files = {path.name for path in (tmp_path / "again").iterdir()}  # none of our sources beside the few lines
    assert files - {"generation_config.json"} == {
        "config.json", "model.json", "model.safetensors", "modeling_contextlab.py",
    }  # fmt: skip


def words():
    """A tokenizer of the words w0, w1, ... of the model's vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({**{f"w{i}": i for i in range(30)}, "[UNK]": 30}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_keywords_of_saving(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    doubled = {name: 2 * each for name, each in wrapped.state_dict().items()}
    wrapped.save_pretrained(tmp_path / "a", state_dict=doubled, safe_serialization=True, save_function=torch.save)
    assert torch.equal(load_model(tmp_path / "a").read_out.weight, 2 * wrapped.model.read_out.weight)
    inner = {name: 3 * each for name, each in wrapped.model.state_dict().items()}
    wrapped.save_pretrained(tmp_path / "b", state_dict=inner)
    assert torch.equal(load_model(tmp_path / "b").read_out.weight, 3 * wrapped.model.read_out.weight)
    for wrong, said in (
        ({"state_dict": {"model.read_in.weigth": torch.zeros(1)}}, "nearest: 'model.read_in.weight'"),
        ({"push_to_hub": True}, "push_to_hub is not taken .*upload_folder"),
        ({"safe_serialization": False}, "weights are always safetensors"),
        ({"max_shard_size": "1MB"}, "one file is written"),
        ({"is_main_proces": True}, "unknown keyword 'is_main_proces'; did you mean 'is_main_process'"),
    ):
        with pytest.raises(InputError, match=said):
            wrapped.save_pretrained(tmp_path / "c", **wrong)
    assert not (tmp_path / "c").exists()


def test_keywords_of_loading(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path)
    auto, ours = transformers.AutoModelForCausalLM.from_pretrained, type(wrapped).from_pretrained
    for load in (auto, ours):
        for name, given, found in (
            ("dtype", "bfloat16", torch.bfloat16),
            ("torch_dtype", torch.float16, torch.float16),
            ("dtype", "float64", torch.float64),
            ("dtype", "auto", torch.float32),
        ):
            model = load(tmp_path, **{name: given})
            assert next(model.parameters()).dtype == model.dtype == found
            assert not model.training
        model, info = load(tmp_path, device_map={"": "cpu"}, output_loading_info=True, local_files_only=True)
        assert model.hf_device_map == {"": torch.device("cpu")}
        assert not any(info.values())
    doubled = {name: 2 * each for name, each in wrapped.state_dict().items()}
    assert torch.equal(ours(tmp_path, state_dict=doubled).model.read_out.weight, 2 * wrapped.model.read_out.weight)
    assert ours(tmp_path.parent, subfolder=tmp_path.name).config.vocab_size == 31
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert auto(tmp_path, config=config).config is config
    other = type(config)(build(width=32).config.spec)
    for wrong, said in (
        ({"dtype": "bfloat15"}, "dtype: expected 'auto' or one of .* nearest is 'bfloat16'"),
        ({"quantization_config": {"bits": 8}}, "quantization_config is not taken"),
        ({"device_map": {"a": "cpu", "b": "meta"}}, "device_map: .* on one device"),
        ({"device_map": "balanced"}, "device_map: .* on one device"),
        ({"attn_implementation": "flash"}, "contextlab.ops.use_backend"),
        ({"output_loading_inf": True}, "unknown keyword .* did you mean 'output_loading_info'"),
        ({"state_dict": {"a": torch.zeros(1)}}, "state_dict: a checkpoint of another model"),
        ({"config": other}, "config.json is of another model"),
    ):
        with pytest.raises(InputError, match=said):
            ours(tmp_path, **wrong)
    with pytest.raises(InputError, match="quantization_config is not taken"):
        auto(tmp_path, quantization_config={"bits": 8})
    with pytest.raises(InputError, match="neither a folder nor a hub name"):
        ours(tmp_path / "nowhere")


def test_a_damaged_configuration_is_told(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    data["spec"]["depth"] = 2
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"config.json is of another model than model.json"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["from_pretrained", "save_pretrained"])
def test_what_transformers_does_by_itself_is_taken_and_the_opposite_refused(method):
    from contextlab.models.pretrained import files

    table, served = {
        "from_pretrained": (files.LOADING, files.SERVED_LOADING),
        "save_pretrained": (files.SAVING, ()),
    }[method]
    parameters = inspect.signature(getattr(transformers.PreTrainedModel, method)).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.name in table}
    assert len(defaults) >= 3
    for name, value in defaults.items():
        files.check_keywords(method, {name: value}, table, served)
        if isinstance(value, bool):
            with pytest.raises(InputError, match=f"^{method}: {name} is not taken for a model of contextlab"):
                files.check_keywords(method, {name: not value}, table, served)
