"""Liger's layer, written token by token."""

from __future__ import annotations

import pytest
import torch

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.hybrid.gated_window import GatedWindow
from contextlab.testing.readings import noisy


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 4])
def test_it_is_half_a_window_and_half_a_gated_recurrence(rank):
    mixer = noisy(GatedWindow(16, window=4, heads=4, kv_heads=2, gate_rank=rank)).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    local = build_mixer("sliding_window", width=16, window=4, heads=4, kv_heads=2).double()
    local.load_state_dict(mixer.state_dict())
    q, k, v = mixer.qkv_proj(x).unflatten(-1, (8, 4)).split((4, 2, 2), 2)
    pooled = k.flatten(2)
    if rank is not None:
        pooled = torch.nn.functional.adaptive_avg_pool1d(pooled, rank).repeat_interleave(8 // rank, -1)
    decays = pooled.unflatten(-1, (2, 4)).sigmoid() ** (1 / 16)
    k, v, decays = (each.repeat_interleave(2, 2) for each in (k, v, decays))
    memory, answers = torch.zeros(2, 4, 4, 4, dtype=torch.float64), []
    for t in range(9):
        write = k[:, t].softmax(-1)[..., :, None] * v[:, t][..., None, :]
        memory = decays[:, t][..., None] * memory + write
        answers.append(torch.einsum("bhk,bhkv->bhv", q[:, t].softmax(-1), memory))
    far = mixer.out_proj(torch.stack(answers, 1).flatten(2))
    torch.testing.assert_close(mixer(x)[0], (local(x)[0] + far) / 2, rtol=0, atol=1e-12)


def test_the_gates_rank_divides_the_keys():
    with pytest.raises(InputError, match="gate_rank 5 does not divide the keys' 16 channels; the nearest is 4"):
        build_mixer("gated_window", width=16, gate_rank=5)
