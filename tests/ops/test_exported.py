"""What exported programs hold of the recurrent ops is what the engines compute, forward and backward."""

from __future__ import annotations

import pytest
import torch

from contextlab import ops
from contextlab.models import build_model

B, T, H, K, V = 2, 37, 2, 3, 4


def tensors(*shapes):
    source = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, generator=source).requires_grad_() for shape in shapes]


def decays(*shape):
    g = -torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    g[:, 20] = -torch.inf
    return g


KEYS, VALUES, STATE = (B, T, H, K), (B, T, H, V), (B, H, K, V)
CALLS = {
    "simple_gla": lambda q, k, v, s: ops.simple_gla(
        q, k, v, decays(B, T, H), initial_state=s, output_final_state=True, chunk_size=16
    ),
    "linear attention": lambda q, k, v, s: ops.linear_attention(q, k, v, initial_state=s, output_final_state=True),
    "gated_delta_rule": lambda q, k, v, s: ops.gated_delta_rule(
        q, 0.3 * k, v, decays(B, T, H), v[..., 0].sigmoid(), initial_state=s, output_final_state=True, chunk_size=16
    ),
    "gla": lambda q, k, v, s: ops.gla(q, k, v, decays(*KEYS), initial_state=s, output_final_state=True, chunk_size=16),
    "rwkv6": lambda q, k, v, s: ops.rwkv6(
        q, k, v, decays(*KEYS), q[0, 0], initial_state=s, output_final_state=True, chunk_size=16
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_plain_chunks_are_the_engines_answers_and_gradients(name, monkeypatch):
    given = tensors(KEYS, KEYS, VALUES, STATE)
    weigh = tensors(VALUES, STATE)

    def found():
        outputs = CALLS[name](*given)
        loss = sum((x * y.detach()).sum() for x, y in zip(outputs, weigh, strict=True))
        return [*outputs, *torch.autograd.grad(loss, given)]

    engine = found()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    for mine, other in zip(found(), engine, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


def test_an_exported_model_can_be_trained():
    model = build_model("gated_delta_net", width=16, depth=1, heads=2, read_in="token", input_size=31, output_size=31)
    tokens = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))
    program = torch.export.export(model, (tokens,)).module()
    slopes = []
    for each in (model, program):
        output = each(tokens)
        parameters = dict(each.named_parameters())
        names = sorted(name for name in parameters if name in dict(model.named_parameters()))
        found = torch.autograd.grad(output.square().mean(), [parameters[n] for n in names], allow_unused=True)
        slopes.append({n: x for n, x in zip(names, found, strict=True) if x is not None})
    assert slopes[0].keys() == slopes[1].keys()
    for name, slope in slopes[0].items():
        torch.testing.assert_close(slopes[1][name], slope, rtol=1e-4, atol=1e-6)
