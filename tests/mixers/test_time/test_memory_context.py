"""Titans' memory as context, step by step."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from contextlab.mixers import build_mixer
from contextlab.ops import naive_titans
from contextlab.ops.position import rope


def test_two_segments_by_hand() -> None:
    torch.manual_seed(0)
    mixer = build_mixer("titans_mac", width=6, heads=1, segment=3, persistent=2).double()
    x = torch.randn(1, 6, 6, dtype=torch.float64)
    y, state = mixer(x)
    memory, expected = torch.zeros(1, 1, 2, 6, 6, dtype=torch.float64), []
    for piece in x[0].split(3):
        q, k, v = mixer.qkv_proj(piece).chunk(3, -1)
        asked = F.normalize(mixer.recall_proj(piece), dim=-1)
        recalled = mixer.context_proj(asked @ memory[0, 0, 0])
        q, k, rk = (rope(z[None, :, None], torch.arange(3))[0, :, 0] for z in (q, k, recalled[:, :6]))
        rows = []
        for t in range(3):
            keys = torch.cat((mixer.persistent[:, 0, 0], rk[: t + 1], k[: t + 1]))
            values = torch.cat((mixer.persistent[:, 1, 0], recalled[: t + 1, 6:], v[: t + 1]))
            rows.append((keys @ q[t] * 6**-0.5).softmax(0) @ values)
        read = torch.stack(rows)
        mq, mk, mv, steps = mixer.memory_proj(read).split((6, 6, 6, 3), -1)
        theta, m, g = (steps + mixer.gate_bias[:, 0]).unbind(-1)
        given = [F.normalize(mq, dim=-1), F.normalize(mk, dim=-1), mv]
        o, memory = naive_titans(
            *(z[None, :, None] for z in given),
            *(z[None, :, None] for z in (theta.sigmoid(), F.logsigmoid(m), F.logsigmoid(g))),
            1.0,
            memory,
        )
        expected.append(mixer.out_proj(mixer.norm(read) * mixer.gate_norm(o[0, :, 0]).sigmoid()))
    torch.testing.assert_close(y[0], torch.cat(expected), rtol=0, atol=1e-10)
    torch.testing.assert_close(state["memory"], memory, rtol=0, atol=1e-10)
