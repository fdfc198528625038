"""LongRoPE's first tokens, which keep plain angles: the paper's formula, whole and in pieces, padded and alone."""

from __future__ import annotations

import pytest
import torch

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.models import ModelSpec
from contextlab.testing.models import noisy as noisy_model
from contextlab.testing.readings import noisy

FACTORS, PLAIN, BASE = (1.0, 1.5, 3.0, 5.0), 3, 50.0
SCALING = {
    "kind": "longrope", "factor": 4.0, "factors": FACTORS, "original_length": 8, "plain_tokens": PLAIN, "sharpen": 1.2,
}  # fmt: skip
CASES = [
    ("attention", {"kv_heads": 1, "short_conv": 2}),
    ("sliding_window", {"window": 6, "sinks": 2}),
    ("sliding_window", {"window": 5, "dilation": 2}),
    ("gated_window", {"window": 6}),
    ("window_linear", {"window": 6}),
]


@torch.no_grad()
def test_each_place_has_the_angles_of_the_paper():
    """2402.13753, equation 2 with lambda_i 1 below n-hat, naively: one query, one key, one pair at a time."""
    mixer = noisy(build_mixer("attention", width=16, heads=2, rope_base=BASE, rope_scaling=SCALING)).double()
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    q, k, v = mixer.qkv_proj(x)[0].unflatten(-1, (3, 2, 8)).unbind(1)

    def turned(each, place):
        numbers = torch.view_as_complex(each.unflatten(-1, (4, 2)))
        for i in range(4):
            stretch = 1.0 if place < PLAIN else FACTORS[i]
            angle = torch.tensor(place / stretch * BASE ** (-2 * i / 8), dtype=torch.float64)
            numbers[i] *= torch.polar(torch.tensor(1.0 if place < PLAIN else 1.2, dtype=torch.float64), angle)
        return torch.view_as_real(numbers).flatten()

    expected = torch.zeros(7, 2, 8, dtype=torch.float64)
    for head in range(2):
        keys = torch.stack([turned(k[t, head].clone(), t) for t in range(7)])
        for t in range(7):
            scores = keys[: t + 1] @ turned(q[t, head].clone(), t) * 8**-0.5
            expected[t, head] = scores.softmax(0) @ v[: t + 1, head]
    torch.testing.assert_close(mixer(x)[0][0], mixer.out_proj(expected.flatten(1)), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), CASES)
def test_padding_and_pieces_change_nothing(name, options):
    """Rows of their own lengths, read in pieces and token by token, each as it is alone and whole."""
    mixer = noisy(build_mixer(name, width=16, heads=2, rope_base=BASE, rope_scaling=SCALING, **options)).double()
    x = torch.randn(3, 14, 16, dtype=torch.float64)
    pads = (0, 2, 5)
    mask = torch.arange(14) >= torch.tensor(pads)[:, None]
    outputs, state = [], None
    for piece in (slice(0, 4), slice(4, 5), slice(5, 12), slice(12, 13), slice(13, 14)):
        y, state = mixer(x[:, piece], state, mask[:, piece] if piece.start < 5 else None)
        outputs.append(y)
    got, whole = torch.cat(outputs, 1), mixer(x, None, mask)[0]
    for row, pad in enumerate(pads):
        alone = mixer(x[row : row + 1, pad:])[0][0]
        for each in (got, whole):
            torch.testing.assert_close(each[row, pad:], alone, rtol=0, atol=1e-11)
    plain = build_mixer(name, width=16, heads=2, rope_base=BASE, rope_scaling=SCALING | {"plain_tokens": 0}, **options)
    plain.double().load_state_dict(mixer.state_dict())
    assert not torch.allclose(plain(x)[0][:, PLAIN:], mixer(x)[0][:, PLAIN:])


@torch.no_grad()
def test_layers_that_share_keys_read_them_at_the_same_places():
    layer = {"mixer": "attention", "options": {"rope_scaling": SCALING}}
    spec = {
        "width": 16, "depth": 2, "heads": 2, "mlp_ratio": 1, "read_in": "token", "input_size": 9, "output_size": 9,
        "layers": [layer, layer | {"kv": "shared"}],
    }  # fmt: skip
    model = noisy_model(ModelSpec.parse(spec)).eval()
    x = torch.randint(9, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) >= torch.tensor((0, 4))[:, None]
    outputs, state = [], None
    for piece in (slice(0, 6), slice(6, 7), slice(7, 12)):
        y, state = model.read(x[:, piece], state, mask[:, piece])
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1)[1, 4:], model(x[1:, 4:])[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sliding_window", {"window": 4, "sinks": 2, "max_distance": 9}, "max_distance turns keys to other places"),
        ("supra", {}, "plain_tokens: supra turns by distances alone; leave it out"),
        ("attention", {"rope_scaling": {"kind": "ntk", "plain_tokens": 2}}, "plain_tokens: ntk does not take it"),
    ],
)
def test_what_needs_distances_alone_is_refused(name, options, message):
    with pytest.raises(InputError) as error:
        build_mixer(name, width=16, heads=2, **{"rope_scaling": SCALING, **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
