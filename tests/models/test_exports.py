"""Models in the form of transformers: its own classes load them and give the same logits."""

from __future__ import annotations

import json
import re

import pytest
import torch

from contextlab import registry
from contextlab.convert import Calibration, build_conversion, convert, merge, shrink
from contextlab.errors import InputError
from contextlab.models import build_model, load
from contextlab.models.exports import check_exportable, save_transformers, transformers_form
from contextlab.models.imports import native_model
from contextlab.testing.conversions import small_model

from .checkpoints import V, reference

transformers = pytest.importorskip("transformers", minversion="5.20")

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
BARE = {"mistral": {"sliding_window": None}}  # so that it, too, has attention to be converted
CONVERSIONS = {
    "gqa": {"kv_heads": 1},
    "rope_scaling": {"factor": 2.0},
    "rope_scaling ntk": {"kind": "ntk", "factor": 4.0},
    "rope_scaling yarn": {"kind": "yarn", "factor": 4.0, "original_length": 16},
    "longrope": {"factor": 2.0, "original_length": 12, "trials": 6},
    "magnitude": {"share": 0.5},
    "slice": {"ratio": 0.25},
    "channels": {"share": 0.3},
    "heads": {"share": 0.5},
    "drop_blocks": {"count": 1},
    "merge_blocks": {"size": 2},
    "laser": {"keep": 0.5, "layers": "blocks.*.mlp.*"},
    "expand": {"count": 1},
}
WINDOWS = {"llama": "mistral", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}


def tokens(length=24):
    return torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def models():
    """Each architecture, imported from random weights in float32."""
    found = {}
    for kind in KINDS:
        theirs = reference(kind, torch.float32, **BARE.get(kind, {}))
        found[kind] = native_model(theirs.config, dict(theirs.state_dict()), kind).eval()
    return found


def converted(model, name, options):
    return build_conversion(name.split()[0], **options)(model, Calibration.of_tokens(tokens())).model


@torch.no_grad()
def check(ours, folder, kind, like=None):
    """transformers' model of the folder, which gives the logits of ours."""
    assert save_transformers(ours, folder, like) == kind
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    assert [type(theirs).__name__] == json.loads((folder / "config.json").read_text())["architectures"]
    torch.testing.assert_close(theirs.eval()(tokens()).logits, ours(tokens()), rtol=0, atol=1e-5)
    return theirs


PAIRS = [
    (kind, name)
    for i, kind in enumerate(KINDS)
    for j, name in enumerate(CONVERSIONS)
    if kind == "llama" or (i + j) % 4 == 0
]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_what_conversions_make_is_loaded_by_transformers(kind, name, models, tmp_path):
    ours = converted(models[kind], name, CONVERSIONS[name])
    theirs = check(ours, tmp_path, kind if kind != "mistral" else "llama")
    if not name.startswith(("rope", "longrope")):
        return
    again = native_model(theirs.config, dict(theirs.state_dict()), "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()), ours(tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_are_held_where_a_config_has_them(kind, models, tmp_path):
    made = converted(models[kind], "window", {"window": 6, "sinks": 0})
    check(made, tmp_path / "all", WINDOWS[kind])
    made = converted(models[kind], "window", {"window": 6, "sinks": 0, "layers": [1]})
    theirs = check(made, tmp_path / "one", "qwen3" if kind == "qwen3" else "qwen2")
    assert theirs.config.layer_types == ["full_attention", "sliding_attention"]


def test_a_merged_model_is_theirs(models, tmp_path):
    other = reference("qwen3", torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    second = native_model(other.config, dict(other.state_dict()), "other")
    check(merge([models["qwen3"], second], "slerp:t=0.3").model, tmp_path, "qwen3")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_files_and_tokens_of_the_source_are_kept(kind, tied, tmp_path):
    theirs = reference(kind, torch.float32, tie_word_embeddings=tied, attention_bias=True)
    theirs.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    ours = load(tmp_path / "old", native=True)
    made = check(ours.eval(), tmp_path / "new", kind, tmp_path / "old")
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    assert (made.config.tie_word_embeddings, made.config.eos_token_id) == (tied, 2)
    assert made.config.max_position_embeddings == theirs.config.max_position_embeddings
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


def test_the_reach_of_a_scaled_model_is_told(models, tmp_path):
    theirs = reference("llama", torch.float32, max_position_embeddings=64)
    theirs.config.save_pretrained(tmp_path / "old")
    made = converted(models["llama"], "rope_scaling", {"factor": 4.0})
    save_transformers(made, tmp_path / "new", tmp_path / "old")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["max_position_embeddings"] == 256


SPEC = {
    "width": 16, "depth": 2, "heads": 2, "read_in": "token", "input_size": V, "output_size": V, "mlp": "swiglu",
    "read_out_bias": False,
}  # fmt: skip


def test_a_model_of_our_own_that_is_a_llama_is_one(tmp_path):
    check(build_model({**SPEC, "layers": ["attention", {"mixer": "sliding_window", "options": {"window": 5}}]}).eval(),
          tmp_path, "qwen2")  # fmt: skip
    odd = {"mixer": "attention", "options": {"heads": 3, "head_dim": 4}}
    check(build_model({**SPEC, "layers": [odd]}).eval(), tmp_path / "odd", "mistral")
    longer = {"kind": "linear", "factor": 2.0, "sharpen": 1.1}
    layer = {"mixer": "attention", "options": {"rope_scaling": longer}}
    check(build_model({**SPEC, "layers": [layer]}).eval(), tmp_path / "scaled", "llama")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp": "gelu"}, "layer 0 has the MLP 'gelu', not swiglu or geglu with tanh"),
        ({"layers": ["attention", "gated_delta_net"]}, "layer 1 is 'gated_delta_net', not attention"),
        ({"layers": ["attention", {"mixer": "attention", "mlp": "none"}]}, "layer 1 has no MLP"),
        ({"position": "alibi"}, "position is 'alibi', not 'rope'"),
        ({"read_out_bias": True}, "read_out.bias has no place in transformers' llama"),
        ({"linear": [{"layers": "*", "form": "int"}]}, "weights of layer 0 are stored in few bits"),
        ({"linear": [{"layers": "read_out", "form": "int"}]}, "read_in or read_out is stored in few bits"),
        ({"loops": 2}, "loops is 2, not 1"),
        (
            {"layers": [{"mixer": "attention", "options": {"heads": 3, "head_dim": 4, "bias": True}}]},
            "its width 16 is no multiple of its 3 heads, and it has biases",
        ),
        (
            {"layers": ["attention", {"mixer": "attention", "options": {"kv_heads": 1}}]},
            "layers differ in kv_heads: 2, 1",
        ),
        (
            {"layers": [{"mixer": "sliding_window", "options": {"window": 4, "sinks": 2}}]},
            "layer 0 has sinks",
        ),
        (
            {"layers": [{"mixer": "attention", "options": {"rope_scaling": {
                "kind": "longrope", "factors": [1.0] * 4, "original_length": 8, "plain_tokens": 2}}}]},
            "layer 0 has plain_tokens",
        ),
        (
            {"layers": [{"mixer": "sliding_window", "options": {"window": size}} for size in (4, 5)]},
            "layers have windows of several sizes: 4, 5",
        ),
        (
            {"layers": [{"mixer": "sliding_window", "options": {"window": 4}}],
             "mlp": {"kind": "geglu", "options": {"tanh": True}}},
            "it has windows beside MLPs of GELU",
        ),
    ],
)  # fmt: skip
def test_what_transformers_cannot_hold_is_told_in_one_line(changes, message, tmp_path):
    model = build_model({**SPEC, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    with pytest.raises(InputError) as error:
        save_transformers(model, tmp_path / "new")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


PLANNED = [
    (entry.name, options)
    for entry in registry.entries("conversion")
    if "models" not in entry.factory.needs
    for options in entry.cases
]


@pytest.mark.parametrize(("name", "options"), PLANNED, ids=lambda each: each if isinstance(each, str) else "")
def test_what_no_architecture_holds_is_known_before_the_work(models, name, options):
    model = models["llama"]
    try:
        conversion = build_conversion(name, **options)
        planned = conversion.plan(model.spec)
    except InputError:
        return  # not of this model
    made = conversion(model, Calibration.of_tokens(tokens())).model
    refusals = []
    for tried in (lambda: check_exportable(planned), lambda: transformers_form(made)):
        try:
            tried()
            refusals.append("")
        except InputError as error:
            refusals.append(re.sub(r"layer \d+", "a layer", str(error)))  # which, data may choose
    assert refusals[0] == refusals[1]


def test_it_is_refused_before_the_work(models, monkeypatch):
    model, read, linear = models["llama"], Calibration.of_tokens(tokens()), small_model("linear_attention")
    monkeypatch.setattr(Calibration, "loss", lambda *_: pytest.fail("it was read already"))
    for make in (
        lambda: shrink(model, "rtn:bits=8", read, transformers=True),
        lambda: convert(model, "gated_delta_net", transformers=True, budget=0),
        lambda: merge(linear, "expand:count=1", transformers=True),
    ):
        with pytest.raises(InputError, match="transformers: cannot hold what comes out: .*; leave --transformers out"):
            make()
