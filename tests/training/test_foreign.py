"""Optimisers of PyTorch and of other packages: the steps are theirs, stopping leaves no trace, and no code is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Sums, Tiny

from contextlab.errors import ContextlabError, InputError
from contextlab.plugins import load_plugins
from contextlab.training import Member, TrainSpec, train, train_together
from contextlab.training.foreign import Foreign, keeps_its_rate, optimizer_class
from contextlab.training.schedule import rate
from contextlab.training.step import TrainState

STEPS = {"steps": 12, "batch": 4, "warmup": 2, "log_every": 3, "checkpoint_every": 4, "learning_rate": 0.01}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "torch.optim.SGD": {"momentum": 0.9, "nesterov": True},
    "torch.optim.NAdam": {},
    "torch.optim.ASGD": {},
    "schedulefree.AdamWScheduleFree": {"warmup_steps": 3},
    "schedulefree.RAdamScheduleFree": {},
    "prodigyopt.Prodigy": {"safeguard_warmup": True},
    "heavyball.SOAP": {},
}


def spec(name: str, **changes: Any) -> TrainSpec:
    """A short training by the optimiser; skips where its package is not installed."""
    package = pytest.importorskip(name.partition(".")[0])
    if package.__name__ == "heavyball":
        package.utils.compile_mode = None  # it compiles for a minute on a CPU
    return TrainSpec.parse({**STEPS, "optimizer": name, "optimizer_options": OPTIMIZERS.get(name, {}), **changes})


def bits(model: Tiny) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stopped_training_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Whatever looks and checkpoints there are between, and in however many pieces."""
    wanted = spec(name)
    whole = Tiny()
    train(whole, Sums(), wanted.model_copy(update={"checkpoint_every": 0}))
    for seed, pause in ((0, 3), (7, 7), (8, None)):
        resumed = Tiny(seed=seed)
        result = train(resumed, Sums(), wanted, folder=tmp_path, resume=True, pause=pause)
    assert result.status == "finished"
    assert same(bits(whole), bits(resumed))
    looked = Tiny()
    until = {"at_most": 1e-9, "every": 2, "prompts": 4}
    train(looked, Sums(), wanted.model_copy(update={"until": TrainSpec.parse({"until": until}).until}))
    assert same(bits(whole), bits(looked))
    read = Tiny(seed=9)
    train(read, Sums(), wanted, folder=tmp_path, resume=True)  # a training that has ended is only read
    assert same(bits(whole), bits(read))


@pytest.mark.parametrize("name", ["torch.optim.SGD", "torch.optim.NAdam", "schedulefree.AdamWScheduleFree"])
def test_the_steps_are_those_of_the_class_by_hand(name: str) -> None:
    wanted = spec(name, weight_decay=0.1, clip=None)
    model, other = Tiny(), Tiny()
    train(model, Sums(), wanted)
    own = list(other.parameters())
    matrices, vectors = [p for p in own if p.ndim >= 2], [p for p in own if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer: Any = optimizer_class(name)(groups, lr=0.01, **OPTIMIZERS[name])
    free = name.startswith("schedulefree")
    if free:
        optimizer.train()
    stream = TrainState.start(Tiny(), TrainSpec(), 0).generator
    for step in range(12):
        prompt = Sums().sample(4, stream)
        optimizer.zero_grad()
        Sums().loss(other(prompt.inputs), prompt).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1.0 if free else rate(step, TrainSpec.parse(STEPS)))
        optimizer.step()
    if free:
        optimizer.eval()
    torch.testing.assert_close(bits(model), bits(other), rtol=1e-6, atol=1e-7)


def test_what_is_looked_at_and_kept_of_a_schedule_free_one_is_the_average(tmp_path: Path) -> None:
    wanted = spec("schedulefree.AdamWScheduleFree")
    model = Tiny()
    state = TrainState.start(model, wanted)
    assert state.foreign is not None
    from contextlab.training.step import train_step

    for _ in range(3):
        train_step(model, Sums(), wanted, state)
    inner = bits(model)
    with state.in_use():
        used = bits(model)
        assert not same(inner, used)
    assert same(inner, bits(model))
    state.leave()
    assert same(used, bits(model))
    result = train(Tiny(), Sums(), wanted, folder=tmp_path)
    assert set(result.history["learning_rate"]) == {0.01}
    assert keeps_its_rate(wanted)
    assert not keeps_its_rate(spec("torch.optim.SGD"))


def test_nothing_is_updated_from_a_gradient_that_is_not_finite() -> None:
    model = Tiny()
    result = train(model, Sums(scale=1e38), spec("torch.optim.SGD", learning_rate=1e5))
    assert result.status == "diverged"
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_checkpoint_holds_tensors_and_json_alone(tmp_path: Path) -> None:
    path = train(Tiny(), Sums(), spec("torch.optim.NAdam"), folder=tmp_path).checkpoint
    assert path is not None
    assert {each.suffix for each in path.iterdir()} == {".json", ".safetensors"}
    record = json.loads((path / "training.json").read_text())
    assert record["optimizer"]["dict"][0][0] == "state"


class Odd(torch.optim.SGD):
    """Keeps what no checkpoint holds."""

    def __init__(self, params: Any, lr: float, kept: str = "object") -> None:
        super().__init__(params, lr)
        self.kept, self.count = kept, 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.kept == "object":
                    self.state[parameter]["odd"] = object()
                parameter.data.sub_(parameter.grad * (self.count if self.kept == "elsewhere" else torch.rand(())))


def _odd(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlab import plugins

    monkeypatch.setitem(plugins._loaded, "odd", sys.modules[__name__])


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ("object", "odd.Odd keeps object <object object"),
        ("elsewhere", "differs from one that was never stopped: it keeps something elsewhere, or draws random numbers"),
        ("random", "differs from one that was never stopped"),
    ],
)
def test_what_could_not_be_resumed_is_refused_before_the_first_step(
    kept: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _odd(monkeypatch)
    model = Tiny()
    before = bits(model)
    with pytest.raises(InputError) as caught:
        train(model, Sums(), {**STEPS, "optimizer": "odd.Odd", "optimizer_options": {"kept": kept}})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(before, bits(model))


@pytest.mark.parametrize(
    ("train_spec", "message"),
    [
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'?"),
        ({"optimizer": "torch.optim.SGDD"}, "unknown optimiser of torch.optim 'SGDD'; did you mean 'SGD'?"),
        ({"optimizer": "torch.optim.lr_scheduler"}, "unknown optimiser of torch.optim 'lr_scheduler'"),
        ({"optimizer": "os.system"}, "os.system: expected muon, adamw, or a class of torch.optim, schedulefree"),
        ({"optimizer": "os.path.join"}, "--plugin os.path"),
        ({"optimizer": "torch.optim.SGD", "optimizer_options": {"momentun": 1}}, "did you mean 'momentum'?"),
        ({"optimizer": "torch.optim.SGD", "optimizer_options": {"momentum": -1}}, "Invalid momentum value"),
        ({"optimizer": "torch.optim.SGD", "optimizer_options": {"lr": 1}}, "give train.learning_rate in its place"),
        ({"optimizer": "torch.optim.LBFGS"}, "LBFGS: asks for the loss again within a step (a closure), which no"),
        ({"optimizer": "torch.optim.Rprop", "weight_decay": 0.1}, "torch.optim.Rprop has none; leave it out"),
        ({"optimizer": "muon", "optimizer_options": {"momentum": 0.5}}, "are for a class such as torch.optim.SGD"),
        ({"optimizer": "a b.C"}, "unknown optimizer 'a b.C'"),
    ],
)
def test_what_cannot_be_is_one_line(train_spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ContextlabError) as caught:
        train(Tiny(), Sums(), {**STEPS, **train_spec})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_imports_nothing_but_the_packages_on_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that lies ready to be imported is not; named as a plugin by whoever runs the recipe, it is."""
    (tmp_path / "lies_ready.py").write_text(
        "import torch\nclass Mine(torch.optim.SGD): pass\nclass Other: pass\ndef build(): return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="lies_ready.Mine: expected muon, adamw, .* --plugin lies_ready"):
        optimizer_class("lies_ready.Mine")
    assert "lies_ready" not in sys.modules
    load_plugins([str(tmp_path / "lies_ready.py")])
    train(Tiny(), Sums(), {**STEPS, "optimizer": "lies_ready.Mine"})
    for other in ("Other", "build", "torch"):
        with pytest.raises(InputError, match=f"unknown optimiser of lies_ready '{other}'"):
            optimizer_class(f"lies_ready.{other}")


def test_several_models_do_not_share_one() -> None:
    members = [Member(Tiny(seed=seed), Sums(), spec("torch.optim.SGD"), seed) for seed in (0, 1)]
    with pytest.raises(InputError, match="which knows one model's parameters; expected muon or adamw, or train each"):
        train_together(members)


def test_gradients_are_read_by_value_whatever_their_layout() -> None:
    """A transposed gradient is no other parameter's (fused kernels read by place in memory)."""
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    gradient = torch.arange(6.0).view(3, 2).T
    for fused in (False, True):
        with torch.no_grad():
            parameter.zero_()
        options = {"optimizer_options": {"fused": fused}, "clip": 1.0}
        Foreign({"w": parameter}, spec("torch.optim.SGD", **options)).step({"w": gradient}, 1.0)
        assert torch.equal(parameter, -gradient)
