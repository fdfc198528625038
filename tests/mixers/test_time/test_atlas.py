"""ATLAS: windows that reach over mini-batches, and what polynomial features add."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab.mixers import build_mixer
from contextlab.ops import naive_atlas


@pytest.mark.parametrize(("batch_tokens", "window", "muon_steps"), [(3, 6, 0), (4, 3, 2)])
def test_a_stream_is_the_recurrence_mini_batch_by_mini_batch(batch_tokens: int, window: int, muon_steps: int) -> None:
    torch.manual_seed(0)
    options = {"batch_tokens": batch_tokens, "window": window, "muon_steps": muon_steps}
    mixer = build_mixer("atlas", width=6, heads=2, **options).double()
    x = torch.randn(2, 4 * batch_tokens, 6, dtype=torch.float64)
    y, state = mixer(x)
    q, past, steps = mixer._project(x).split(mixer._parts(), -1)
    k, v, gate = past.split((6, 6, 2), -1)
    q, k, v = (z.unflatten(-1, (2, 3)).transpose(1, 2) for z in (q, k, v))
    theta, m, g = (z.transpose(1, 2) for z in (steps.unflatten(-1, (3, 2)) + mixer.gate_bias).unbind(2))
    q, k = mixer._features(q), mixer._features(k)
    # Zeros before the first token weigh nothing: their gates are 0.
    k, v, gate = (F.pad(z, (0, 0, window - 1, 0)) for z in (k, v, gate))
    memory = [torch.zeros(2, 2, mixer.features, 3, dtype=torch.float64) for _ in range(2)]
    rate = 1.0 if muon_steps else 1 / (window * batch_tokens)
    outputs = []
    for n in range(4):
        own = slice(n * batch_tokens, (n + 1) * batch_tokens)
        seen = slice(own.start, own.stop + window - 1)
        o, *memory = naive_atlas(
            q[:, :, own], k[:, :, seen], v[:, :, seen], rate * theta[..., own].sigmoid(), F.logsigmoid(m[..., own]),
            F.logsigmoid(g[..., own]), gate[:, seen].transpose(1, 2), *memory, window, muon_steps, mixer.step,
        )  # fmt: skip
        outputs.append(o)
    o = torch.cat(outputs, 2).transpose(1, 2)
    torch.testing.assert_close(y, mixer.out_proj(mixer.norm(o).flatten(2)), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state["matrix"], memory[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state["momentum"], memory[1], rtol=1e-9, atol=1e-10)


def test_features_of_degree_two_tell_more_keys_apart_than_a_key_has_numbers() -> None:
    keys = torch.randn(1, 1, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ranks = [
        torch.linalg.matrix_rank(build_mixer("atlas", width=4, heads=1, degree=degree).double()._features(keys)).item()
        for degree in (1, 2)
    ]
    assert ranks == [5, 9]


@pytest.mark.parametrize("options", [{"muon_steps": 0}, {"batch_tokens": 3, "window": 6, "muon_steps": 0}, {}])
def test_its_memory_does_not_grow_on_like_keys(options: dict[str, int]) -> None:
    """All keys of a mini-batch alike is the worst case: each of its steps then goes the same way."""
    mixer = build_mixer("atlas", width=12, heads=2, **options).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 12, dtype=torch.float64, generator=generator)
    x = x + 0.1 * torch.randn(1, 2000, 12, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        _, early = mixer(x[:, :200])
        _, late = mixer(x)
    assert late["matrix"].abs().max() < 3 * early["matrix"].abs().max()
