from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import Tiny
from torch import Tensor, nn

from contextlab.training import optim


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _step(params: dict[str, Tensor], gradients: dict[str, Tensor], state: dict[str, Tensor], **changed: object) -> None:
    settings = {"learning_rate": 0.01, "matrix_learning_rate": 0.02, **changed}
    optim.update(params, gradients, state, **settings)  # type: ignore[arg-type]


def test_adamw_is_that_of_torch() -> None:
    shapes = {"matrix": (4, 3), "bias": (5,), "kernel": (2, 1, 3)}
    ours = {name: _randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    theirs = {name: nn.Parameter(tensor.clone()) for name, tensor in ours.items()}
    decayed = [p for p in theirs.values() if p.ndim >= 2]
    plain = [p for p in theirs.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), foreach=False, fused=False)
    state = optim.init(ours)
    for step in range(10):
        gradients = {name: _randn(*shape, seed=100 + 10 * step + len(name)) for name, shape in shapes.items()}
        for name, parameter in theirs.items():
            parameter.grad = gradients[name].clone()
        reference.step()
        _step(ours, gradients, state, betas=(0.8, 0.95), weight_decay=0.1)
    for name in shapes:
        torch.testing.assert_close(ours[name], theirs[name].data, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "gradient",
    [
        _randn(3, 4).T,  # as that of Mamba's A_log, which the scan reads transposed
        torch.view_as_complex(_randn(4, 3, 2)).imag,  # as that of S4D's frequencies
        torch.tensor(2.0, dtype=torch.float64).expand(4, 3),
    ],
)
def test_a_gradient_counts_by_its_indices_whatever_its_strides(gradient: Tensor) -> None:
    start = _randn(4, 3, seed=1)
    theirs = nn.Parameter(start.clone())
    theirs.grad = gradient.contiguous()
    torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0, foreach=False, fused=False).step()
    ours = {"p": start.clone()}
    _step(ours, {"p": gradient}, optim.init(ours))
    torch.testing.assert_close(ours["p"], theirs.data, rtol=1e-12, atol=1e-14)


def test_muon_decays_in_the_dtype_of_its_matrices() -> None:
    """A matrix without a gradient only shrinks, in float64 to all digits."""
    ours = {"w": _randn(4, 3)}
    expected = ours["w"] * (1 - 0.02 * 0.3)
    _step(ours, {"w": torch.zeros(4, 3, dtype=torch.float64)}, optim.init(ours, {"w"}), weight_decay=0.3)
    torch.testing.assert_close(ours["w"], expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 64)])
def test_muon_is_that_of_torch(shape: tuple[int, int]) -> None:
    """PyTorch iterates in bfloat16: single entries differ by its rounding, the update as a whole does not."""
    start = _randn(*shape, dtype=torch.float32)
    ours, theirs = {"w": start.clone()}, nn.Parameter(start.clone())
    reference = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1)
    state = optim.init(ours, {"w"})
    for step in range(5):
        gradient = _randn(*shape, seed=step + 1, dtype=torch.float32)
        theirs.grad = gradient.clone()
        reference.step()
        _step(ours, {"w": gradient}, state, weight_decay=0.1)
    moved, expected = ours["w"] - start, theirs.data - start
    assert (moved - expected).norm() < 0.03 * expected.norm()


@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 3), rows=st.integers(1, 8), more=st.integers(0, 9), seed=st.integers(0, 999))
def test_orthogonalize_maps_the_singular_values(count: int, rows: int, more: int, seed: int) -> None:
    matrix = _randn(count, rows, rows + more, seed=seed)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = optim.QUINTIC
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(optim.orthogonalize(matrix), u * s[:, None] @ vh, rtol=1e-7, atol=1e-9)


def test_orthogonalize_brings_singular_values_near_one() -> None:
    found = torch.linalg.svdvals(optim.orthogonalize(_randn(4, 32, 96)))
    assert found.min() > 0.6
    assert found.max() < 1.25


@settings(deadline=None, max_examples=10)
@given(weight_decay=st.sampled_from([0.0, 0.1]), bad=st.sampled_from([float("nan"), float("inf")]))
def test_a_skipped_step_changes_nothing(weight_decay: float, bad: float) -> None:
    params = {"w": _randn(4, 6), "u": _randn(6, 4, seed=1), "b": _randn(3, seed=2), "e": _randn(5, 2, seed=3)}
    state = optim.init(params, {"w", "u"})
    _step(params, {n: torch.ones_like(p) for n, p in params.items()}, state)
    before = {n: t.clone() for n, t in {**params, **state}.items()}
    gradients = {n: torch.full_like(p, bad) for n, p in params.items()}
    _step(params, gradients, state, weight_decay=weight_decay, skip=torch.ones(()))
    for name, tensor in {**params, **state}.items():
        assert torch.equal(tensor, before[name]), name


def test_matrices_of_one_shape_do_not_mix() -> None:
    together = {"a": _randn(4, 6), "b": _randn(6, 4, seed=1), "c": _randn(4, 6, seed=2)}
    alone = {name: tensor.clone() for name, tensor in together.items()}
    gradients = {name: _randn(*tensor.shape, seed=9) for name, tensor in together.items()}
    _step(together, gradients, optim.init(together, set(together)))
    for name, tensor in alone.items():
        only = {name: tensor}
        _step(only, {name: gradients[name]}, optim.init(only, {name}))
        torch.testing.assert_close(tensor, together[name])


def test_muon_takes_the_matrices_inside_the_blocks() -> None:
    model = Tiny()
    model.blocks.append(nn.Conv1d(4, 4, 3))
    model.blocks.append(nn.LSTM(4, 5))
    model.blocks.append(nn.Embedding(4, 5))
    assert optim.matrices(model) == {
        "blocks.0.up.weight",
        "blocks.0.down.weight",
        "blocks.1.up.weight",
        "blocks.1.down.weight",
        "blocks.3.weight_ih_l0",
        "blocks.3.weight_hh_l0",
    }
