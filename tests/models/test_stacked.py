from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contextlab import registry
from contextlab.errors import InputError
from contextlab.models import build_model
from contextlab.models.stacked import call_together, reasons_apart, untrained
from contextlab.testing import mixers, mlps
from contextlab.testing.law import Component

LENGTH, MEMBERS = 20, 2


def answer(module: nn.Module, x: Tensor) -> Tensor:
    """What a mixer or an MLP makes of x [B, T, D] in training."""
    y = module(x, None, None, False)[0] if isinstance(module, mixers.Mixer) else module(x)
    assert isinstance(y, Tensor)
    return y


def hold_together(component: Component) -> None:
    """Two of a component, called as one, answer as each alone, forward and backward. Raises where they cannot."""
    modules = []
    for seed in range(MEMBERS):
        torch.manual_seed(seed)
        modules.append(component.build().double().train())
    width = mixers.WIDTH if component.kind == "mixer" else mlps.WIDTH
    x = torch.randn(MEMBERS, 2, LENGTH, width, dtype=torch.float64, requires_grad=True)
    named = [dict(module.named_parameters()) for module in modules]
    stacked = {name: torch.stack([each[name].detach() for each in named]).requires_grad_() for name in named[0]}
    together = call_together(modules[0], {**stacked, **untrained(modules)}, answer, x)
    found = torch.autograd.grad(together.square().sum(), [x, *stacked.values()], materialize_grads=True)
    for m, module in enumerate(modules):
        alone = answer(module, x[m])
        wanted = torch.autograd.grad(alone.square().sum(), [x, *module.parameters()], materialize_grads=True)
        torch.testing.assert_close(together[m], alone, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[0][m], wanted[0][m], rtol=1e-9, atol=1e-9)
        for name, ours, theirs in zip(stacked, found[1:], wanted[1:], strict=True):
            size = max(1.0, float(theirs.abs().max()))
            torch.testing.assert_close(ours[m] / size, theirs / size, rtol=0, atol=1e-9, msg=name)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ("mixer", "mlp") for name in registry.names(kind)])
def test_what_a_component_declares_of_training_together_is_true(kind: str, name: str) -> None:
    entry = registry.lookup(kind, name)
    components = list((mixers if kind == "mixer" else mlps).cases(entry))
    if not entry.factory.trains_alone:  # type: ignore[attr-defined]
        for component in components:
            hold_together(component)
        return
    failures = 0
    for component in components:
        try:
            hold_together(component)
        except (RuntimeError, InputError):
            failures += 1
    assert failures, f"all cases of {name} can be called as one; it need not declare trains_alone"


def test_models_tell_which_of_their_parts_keep_them_apart() -> None:
    spec = {"width": 8, "depth": 2, "input_size": 3, "output_size": 1, "layers": [{"mixer": "gru"}, {"mixer": "gla"}]}
    assert reasons_apart(build_model(spec)) == ["Gru: PyTorch's LSTM and GRU take one set of weights"]
    assert reasons_apart(build_model(spec | {"layers": [{"mixer": "gla"}]})) == []


def test_each_has_its_own_of_what_is_not_trained() -> None:
    modules = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
    modules[1].running_mean.add_(1)  # type: ignore[union-attr]
    modules[1].weight.data.mul_(3)
    modules[1].weight.requires_grad_(False)
    modules[0].weight.requires_grad_(False)
    found = untrained(modules)
    assert set(found) == {"running_mean", "weight"}
    assert found["weight"].tolist() == [[1, 1], [3, 3]]
