"""sLSTM against its formula without the stabiliser, and where that overflows."""

from __future__ import annotations

import torch

from contextlab.ops import slstm

B, T, H, D = 2, 12, 2, 3


def inputs(scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gates = scale * torch.randn(B, T, H, 4, D, generator=generator, dtype=torch.float64)
    return gates, torch.randn(H, D, 4 * D, generator=generator, dtype=torch.float64)


def test_it_is_the_formula_without_the_stabiliser() -> None:
    gates, R = inputs()
    found, _ = slstm(gates, R)
    c = n = h = torch.zeros(B, H, D, dtype=torch.float64)
    for t in range(T):
        z, i, f, o = (gates[:, t] + torch.einsum("bhd,hde->bhe", h, R).unflatten(-1, (4, D))).unbind(2)
        c = torch.sigmoid(f) * c + i.exp() * z.tanh()
        n = torch.sigmoid(f) * n + i.exp()
        h = torch.sigmoid(o) * c / n
        torch.testing.assert_close(found[:, t], h, rtol=0, atol=1e-10)


def test_gates_beyond_the_range_of_exp_do_no_harm() -> None:
    gates, R = inputs(1000.0)
    h, state = slstm(gates.float(), R.float())
    assert h.isfinite().all()
    assert all(x.isfinite().all() for x in state)
    assert h.abs().max() <= 1 + 1e-5


def test_gradients_and_states_handed_on() -> None:
    gates, R = inputs()
    whole, last = slstm(gates, R)
    first, state = slstm(gates[:, :5], R)
    second, after = slstm(gates[:, 5:], R, state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    for a, b in zip(last, after, strict=True):
        torch.testing.assert_close(a, b)
    leaves = [gates[:1, :3].clone().requires_grad_(), R.clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda g, r: slstm(g, r)[0], leaves)
