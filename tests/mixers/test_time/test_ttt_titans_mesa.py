"""TTT's mixers: mini-batches handed on, and a memory that has learned what it read."""

from __future__ import annotations

import torch

from contextlab.mixers import build_mixer
from contextlab.ops.ttt import InnerNorm, naive_ttt


def test_the_inner_model_takes_a_step_for_every_complete_mini_batch() -> None:
    torch.manual_seed(0)
    mixer = build_mixer("ttt_linear", width=6, heads=1, batch_tokens=4).double()
    x = torch.randn(1, 11, 6, dtype=torch.float64)
    _, state = mixer(x)
    weights = [mixer.W[0], mixer.b[0]]
    with torch.no_grad():
        for piece in x[:, :8].split(4, 1):
            q, k, v, rate = (y[0, 0] for y in mixer._split(mixer.in_proj(piece)))
            _, weights = naive_ttt(q, k, v, rate, weights, InnerNorm(mixer.gain[0], mixer.bias[0]))
    torch.testing.assert_close(state["W"][0, 0], weights[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(state["b"][0, 0], weights[1], rtol=0, atol=1e-10)
    assert state["waiting"].tolist() == [3]


def test_reading_the_same_tokens_again_and_again_lowers_the_inner_loss() -> None:
    for name in ("ttt_linear", "ttt_mlp"):
        torch.manual_seed(0)
        mixer = build_mixer(name, width=8, heads=2, batch_tokens=8, learning_rate=1.0)
        x = torch.randn(1, 8, 8).repeat(1, 20, 1)
        tokens = mixer._project(x[:, :8])
        _, k, v, rate = mixer._split(tokens)

        def loss(memory, mixer=mixer, k=k, v=v, rate=rate):
            still = torch.zeros_like(rate)  # answers of the model as it stands, to the keys
            from contextlab.ops.ttt import ttt_linear, ttt_mlp

            if "W" in memory:
                o = ttt_linear(k, k, v, still, memory["W"], memory["b"], mixer._norm())[0]
            else:
                weights, biases = (memory["W1"], memory["W2"]), (memory["b1"], memory["b2"])
                o = ttt_mlp(k, k, v, still, weights, biases, mixer._norm())[0]
            return (o - v).square().mean().item()

        with torch.no_grad():
            before = loss(mixer._start(x))
            after = loss(mixer(x)[1].memory)
        assert after < 0.9 * before
