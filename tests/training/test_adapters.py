"""LoRA, DoRA and (IA)^3 by peft: merged models answer as before, stopping leaves no trace, files are plain models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from contextlab import registry
from contextlab.errors import ContextlabError, InputError
from contextlab.models import Model, ModelSpec, build_model, load_model
from contextlab.tasks import build_task
from contextlab.training import Ia3Spec, LoraSpec, Member, TrainSpec, train, train_together
from contextlab.training.adapters import adapted

peft = pytest.importorskip("peft")
TASK = build_task("associative_recall", vocabulary=12, pairs=2, length=8)
FORM = ModelSpec(width=16, depth=2, heads=2).for_task(TASK)
TOKENS = torch.randint(12, (2, 8), generator=torch.Generator().manual_seed(0))
STEPS: dict[str, Any] = {
    "steps": 8,
    "batch": 4,
    "warmup": 2,
    "log_every": 2,
    "checkpoint_every": 3,
    "precision": "float32",
}


def spec(**changes: Any) -> TrainSpec:
    return TrainSpec.parse({**STEPS, "lora": {"rank": 2}, **changes})


def bits(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def some(adapters: Any) -> None:
    """Numbers in the matrices that start as zeros."""
    with torch.no_grad():
        for name, tensor in adapters.tensors().items():
            if "lora_B" in name:
                tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
            if "ia3_l" in name:
                tensor.normal_(1, 0.3, generator=torch.Generator().manual_seed(len(name)))


MIXERS = [each for each in registry.entries("mixer") if each.factory.__module__.startswith("contextlab.")]
FAMILIES = sorted({each.family for each in MIXERS})
# Two of each family: the laws of mixers hold each of them to adapters of the same form.
OURS = [sorted(e.name for e in MIXERS if e.family == family and e.name != "parallel")[:2] for family in FAMILIES]


@pytest.mark.parametrize("mixer", [name for names in OURS for name in names])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_merged_model_answers_as_before_whatever_its_mixer(mixer: str, kind: str) -> None:
    adapter = LoraSpec(rank=2, dora=mixer == "attention") if kind == "lora" else Ia3Spec(targets=("blocks.*",))
    try:
        model = build_model({**FORM.model_dump(), "width": 32, "depth": 1, "layers": [mixer], "mlp": "swiglu"}).double()
    except InputError:
        pytest.skip("cannot stand in a plain model of this size")
    model.eval()
    before = model(TOKENS)
    with torch.no_grad(), adapted(model, adapter) as adapters:
        assert adapters is not None
        torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=1e-9)  # B is zero, factors are one
        some(adapters)
        wanted = model(TOKENS)
        with adapters.merged():
            torch.testing.assert_close(model(TOKENS), wanted, rtol=0, atol=1e-9)
        assert torch.equal(model(TOKENS), wanted)
    assert type(model.blocks[0].mlp.up).__module__.startswith("contextlab.")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), wanted, rtol=0, atol=1e-9)
    assert not torch.allclose(wanted, before)


@pytest.mark.parametrize("rank", [2, 16])
def test_what_is_merged_is_the_formula(rank: int) -> None:
    """W + alpha / r B A (2106.09685); at full rank any change of W is one."""
    model = build_model(FORM).double()
    before = bits(model)
    with adapted(model, LoraSpec(rank=rank, alpha=3, targets=("blocks.1.mixer.out_proj",))) as adapters:
        assert adapters is not None
        found = {name.rpartition("out_proj.")[2]: each for name, each in adapters.tensors().items()}
        a, b = found["lora_A.default.weight"], found["lora_B.default.weight"]
        if rank == 16:
            change = torch.randn(16, 16, dtype=torch.float64)
            with torch.no_grad():
                a.copy_(torch.eye(16))
                b.copy_(change * 16 / 3)
        else:
            some(adapters)
        wanted = before["blocks.1.mixer.out_proj.weight"] + 3 / rank * b @ a
    after = bits(model)
    torch.testing.assert_close(after["blocks.1.mixer.out_proj.weight"], wanted, rtol=0, atol=1e-12)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"blocks.1.mixer.out_proj.weight"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_factors_are_of_outputs_and_of_hidden_channels() -> None:
    """diag(l) W and diag(l) b, and of the MLP's matrix out W diag(l) ((IA)^3, 2205.05638, eq. 2)."""
    model = build_model(FORM, seed=1).double()
    with torch.no_grad():
        model.read_out.bias.normal_()
    before = bits(model)
    spec = Ia3Spec(targets=("read_out", *Ia3Spec().targets))
    with adapted(model, spec) as adapters:
        assert adapters is not None
        some(adapters)
        factors = {n.split(".ia3_l")[0][9:]: each.clone() for n, each in adapters.tensors().items() if "ia3_l" in n}
    after = bits(model)
    assert factors["blocks.0.mlp.out_proj"].shape == (1, model.blocks[0].mlp.out_proj.in_features)
    assert factors["blocks.0.mixer.qkv_proj"].shape == (48, 1)
    for name, factor in factors.items():
        torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] * factor, rtol=0, atol=1e-12)
    torch.testing.assert_close(after["read_out.bias"], before["read_out.bias"] * factors["read_out"][:, 0])
    same_as_before = before.keys() - {f"{name}.weight" for name in factors} - {"read_out.bias"}
    assert all(torch.equal(after[name], before[name]) for name in same_as_before)
    assert "blocks.0.mlp.up.weight" in same_as_before


def test_zeros_stay_where_they_are_to() -> None:
    """W + M * (alpha / r B A), in training as after it (SparsePEFT, 2410.03750)."""
    model = build_model(FORM).double()
    layer = model.blocks[0].mlp.up
    with torch.no_grad():
        layer.weight[layer.weight.abs() < layer.weight.abs().median()] = 0
        model.blocks[1].mlp.up.weight.zero_()  # nothing is to be kept of it
    before = bits(model)
    with torch.no_grad(), adapted(model, LoraSpec(rank=2, alpha=6, keep_zeros=True)) as adapters:
        assert adapters is not None
        some(adapters)
        wanted = model(TOKENS)
        parts = {name: each.clone() for name, each in adapters.tensors().items() if "blocks.0.mlp.up." in name}
        a, b = (parts[f"adapters.blocks.0.mlp.up.lora_{part}.default.weight"] for part in "AB")
        with adapters.merged():
            torch.testing.assert_close(model(TOKENS), wanted, rtol=0, atol=1e-9)
        assert torch.equal(model(TOKENS), wanted)
    torch.testing.assert_close(model(TOKENS), wanted, rtol=0, atol=1e-9)
    old, new = before["blocks.0.mlp.up.weight"], model.blocks[0].mlp.up.weight.detach()
    torch.testing.assert_close(new, old + (old != 0) * (3 * b @ a), rtol=0, atol=1e-12)
    assert torch.equal(new == 0, old == 0)
    assert model.blocks[1].mlp.up.weight.all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": None, "ia3": {}},
        {"lora": {"rank": 2, "dora": True, "targets": ["*.mlp.*", "read_out"]}},
        {"lora": {"rank": 2, "also": ["read_out.*"]}, "weight_decay": 0.1},
        {"optimizer": "torch.optim.NAdam"},
        {"optimizer": "schedulefree.AdamWScheduleFree", "learning_rate": 0.01},
    ],
)
def test_a_stopped_training_goes_on_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip(str(changes.get("optimizer", "torch")).partition(".")[0])
    wanted = spec(**changes)
    whole = build_model(FORM)
    before = bits(whole)
    train(whole, TASK, wanted.model_copy(update={"checkpoint_every": 0}))
    for seed, pause in ((0, 2), (3, 5), (4, None)):
        resumed = build_model(FORM, seed=seed)
        result = train(resumed, TASK, wanted, folder=tmp_path, resume=True, pause=pause)
    assert same(bits(whole), bits(resumed))
    assert result.checkpoint is not None
    assert same(bits(load_model(result.checkpoint)), bits(whole))  # a plain model, merged
    looked = build_model(FORM)
    until = TrainSpec.parse({"until": {"at_least": 1.0, "every": 2, "prompts": 4}}).until
    train(looked, TASK, wanted.model_copy(update={"until": until}))
    assert same(bits(whole), bits(looked))
    also = tuple((changes.get("lora") or {}).get("also", ()))
    layers = {name for name in before if not torch.equal(before[name], bits(whole)[name])}
    assert layers
    assert all(name.endswith("_proj.weight") or "mlp.up" in name or name.startswith("read_out.") for name in layers)
    assert ("read_out.bias" in layers) == bool(also)


def test_an_adapter_stands_beside_the_merged_model_as_peft_reads_it(tmp_path: Path) -> None:
    trained, base = build_model(FORM), build_model(FORM)
    result = train(trained, TASK, spec(learning_rate=0.01), folder=tmp_path)
    assert result.checkpoint is not None
    below = peft.PeftModel.from_pretrained(base, str(result.checkpoint))
    torch.testing.assert_close(below(TOKENS), trained(TOKENS), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(build_model(FORM)(TOKENS), trained(TOKENS), atol=1e-4)


def test_the_first_step_is_that_of_adapters_by_hand() -> None:
    """With rate eta, SGD moves B by eta dL/dW A^T and leaves A, as B is zero; so the merged W moves by that times A."""
    wanted = spec(steps=1, warmup=0, clip=None, optimizer="torch.optim.SGD", learning_rate=0.5,
                  lora={"rank": 2, "targets": ["blocks.0.mixer.out_proj"]})  # fmt: skip
    model, by_hand = build_model(FORM), build_model(FORM)
    with adapted(build_model(FORM), wanted.lora) as adapters:
        assert adapters is not None
        a = next(each.clone() for name, each in adapters.tensors().items() if "lora_A" in name)
    from contextlab.training import TrainState

    prompt = TASK.sample(4, TrainState.start(build_model(FORM), spec()).generator)
    TASK.loss(by_hand(prompt.inputs), prompt).backward()
    train(model, TASK, wanted)
    layer, other = model.blocks[0].mixer.out_proj.weight, by_hand.blocks[0].mixer.out_proj.weight
    assert other.grad is not None
    torch.testing.assert_close(layer, other - 0.5 * other.grad @ a.T @ a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["blocks.0.mixer.qkv"]}, "did you mean 'blocks.0.mixer.qkv_proj'?"),
        ({"targets": ["read_in"]}, "train.lora.targets: 'read_in' matches no linear layer"),
        ({"targets": []}, "train.lora: targets: expected patterns over names of linear layers"),
        ({"rank": 17}, "train.lora.rank: 17 is more than any matrix of these layers has; expected at most 16"),
        ({"also": ["blocks.0.mixer.*"]}, "blocks.0.mixer.qkv_proj.weight has an adapter"),
        ({"also": ["blocks.0.norm"]}, "train.lora.also: 'blocks.0.norm' matches no parameter"),
        ({"rank": 0}, "train.lora.rank: input should be greater than 0"),
    ],
)
def test_what_cannot_be_is_one_line(lora: dict[str, Any], message: str) -> None:
    model = build_model(FORM)
    with pytest.raises(ContextlabError) as caught:
        train(model, TASK, {**STEPS, "lora": lora})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(bits(model), bits(build_model(FORM)))


@pytest.mark.parametrize(("pattern", "hint"), [("*.mlp.*", "name layers that are dense, such as .*, or "), ("*", "")])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_layers_with_a_form_are_not_left_out_in_silence(kind: str, pattern: str, hint: str) -> None:
    model = build_model(ModelSpec.parse(FORM.model_dump() | {"linear": [{"layers": pattern, "form": "int"}]}))
    told = rf"train.{kind}.targets: blocks.* is stored as int, .*{hint}put LoRA beside"
    with pytest.raises(InputError, match=told):
        train(model, TASK, {**STEPS, kind: {}})
    if hint and kind == "lora":
        train(model, TASK, {**STEPS, "lora": {"targets": "*.mixer.*"}})


def test_adapters_are_not_trained_together_nor_twice_nor_with_freeze() -> None:
    members = [Member(build_model(FORM, seed=seed), TASK, spec(), seed) for seed in (0, 1)]
    with pytest.raises(InputError, match="puts adapters into one model; train each alone"):
        train_together(members)
    with pytest.raises(InputError, match="lora trains its adapters and `also` alone; leave freeze out"):
        spec(freeze=["blocks.*"])
    with pytest.raises(InputError, match="lora and ia3: a model has adapters of one kind"):
        spec(ia3={})
    with pytest.raises(InputError, match="weight_decay and ia3: it draws factors to 0"):
        spec(lora=None, ia3={}, weight_decay=0.1)
    with pytest.raises(InputError, match="dora and keep_zeros"):
        spec(lora={"dora": True, "keep_zeros": True})
    model = build_model(FORM)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["out_proj"]), model)
    with pytest.raises(InputError, match="the model has adapters of its own; merge them first"):
        train(model, TASK, spec())
    refused = build_model(FORM)
    with pytest.raises(InputError, match="LBFGS"):
        train(refused, TASK, spec(optimizer="torch.optim.LBFGS"))
    assert same(bits(refused), bits(build_model(FORM)))
