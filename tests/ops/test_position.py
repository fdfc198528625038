from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contextlab.errors import InputError
from contextlab.ops.position import (
    RopeScaling,
    alibi_slopes,
    pairs_of_halves,
    rope,
    rope_frequencies,
    rope_table,
    rotary_size,
    rotate,
    sinusoidal,
    step_table,
)
from contextlab.ops.position_variants import carope_phases, clex_frequencies, gali_places, gali_table, xpos_attention


def test_rope_matches_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8)
    positions = torch.randint(0, 500, (2, 7))
    inverse = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    angles = positions[..., None] * torch.cat([inverse, inverse])
    expected = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), angles.cos(), angles.sin())
    for x, theirs in zip((q, k), expected, strict=True):
        ours, theirs = rope(pairs_of_halves(x, 8), positions), pairs_of_halves(theirs.transpose(1, 2), 8)
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_rope_matches_gpt_j() -> None:
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x = torch.randn(2, 7, 4, 8)
    sin, cos = gptj.create_sinusoidal_positions(7, 8).expand(2, -1, -1).chunk(2, -1)
    theirs = gptj.apply_rotary_pos_emb(x, sin, cos)
    torch.testing.assert_close(rope(x, torch.arange(7)), theirs, atol=1e-5, rtol=1e-5)


def test_partial_rope_matches_transformers() -> None:
    phi = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    q = torch.randn(1, 5, 2, 12, dtype=torch.float64)
    positions = torch.arange(5)
    inverse = 500.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    angles = (positions[:, None] * torch.cat([inverse, inverse]))[None]
    theirs, _ = phi.apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), angles.cos(), angles.sin())
    ours = rope(pairs_of_halves(q, 6), positions, base=500.0, fraction=0.5)
    torch.testing.assert_close(ours, pairs_of_halves(theirs.transpose(1, 2), 6))


@given(shift=st.integers(0, 10**6), seed=st.integers(0, 2**31), fraction=st.sampled_from([0.25, 0.5, 1.0]))
def test_rope_is_relative_and_keeps_norms(shift: int, seed: int, fraction: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 6, 3, 16, dtype=torch.float64, generator=generator)
    at = torch.arange(6)

    def scores(offset: int) -> torch.Tensor:
        turned = [rope(x, at + offset, fraction=fraction) for x in (q, k)]
        return torch.einsum("bihd,bjhd->bhij", *turned)

    torch.testing.assert_close(scores(shift), scores(0), atol=1e-8, rtol=0)
    torch.testing.assert_close(rope(q, at + shift, fraction=fraction).norm(dim=-1), q.norm(dim=-1))


def test_rope_is_right_at_a_million() -> None:
    x = torch.zeros(1, 1, 1, 64)
    x[..., ::2] = 1
    turned = rope(x, torch.tensor([1_000_003]))[0, 0, 0]
    for i in range(32):
        angle = 1_000_003 * 10000.0 ** (-2 * i / 64)
        assert turned[2 * i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert turned[2 * i + 1].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_rope_of_half_precision_keeps_its_dtype_and_gradient() -> None:
    x = torch.randn(1, 3, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    y = rope(x, torch.arange(3))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, rope(x.float(), torch.arange(3)).bfloat16())  # the real form and the complex one
    y.sum().backward()
    assert x.grad is not None
    double = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope(x, torch.arange(3), fraction=0.5), (double,))


@pytest.mark.parametrize(
    ("head_dim", "fraction", "hint"),
    [
        (6, 0.5, "fits is 0.333333"),
        (8, 0.1, "fits is 0.25"),
        (3, 1.0, "fits is 0.666667"),
        (1, 1.0, "least 2"),
    ],
)
def test_rotary_size_refuses_what_does_not_pair(head_dim: int, fraction: float, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        rotary_size(head_dim, fraction)
    if head_dim > 1:
        assert rotary_size(head_dim, float(hint.split()[-1])) == 2  # what the message offers works


def test_alibi_slopes() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in (1, 2, 3, 6, 8, 12, 20):
        theirs = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # [heads, 1, 2], slope * position
        torch.testing.assert_close(alibi_slopes(heads).float(), theirs[:, 0, 1])
    with pytest.raises(InputError, match="at least 1"):
        alibi_slopes(0)


@pytest.mark.parametrize("width", [1, 4, 7])
def test_sinusoidal_by_its_definition(width: int) -> None:
    table = sinusoidal(torch.tensor([[0, 3], [10, 10**6]]), width, dtype=torch.float64)
    assert table.shape == (2, 2, width)
    for (b, t), position in {(0, 0): 0, (0, 1): 3, (1, 0): 10, (1, 1): 10**6}.items():
        for i in range(width):
            angle = position / 10000 ** ((i - i % 2) / width)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert table[b, t, i].item() == pytest.approx(expected, abs=1e-9)


def test_heads_of_odd_size_turned_in_part() -> None:
    x = torch.randn(2, 5, 3, 7, dtype=torch.float64, requires_grad=True)
    y = rope(x, torch.arange(5), fraction=0.6)
    torch.testing.assert_close(y[..., :4], rope(x[..., :4].contiguous(), torch.arange(5)))
    assert torch.equal(y[..., 4:], x[..., 4:])
    y.sum().backward()
    odd_step = torch.randn(2, 5, 3, 9, dtype=torch.float64)[..., 1:]
    torch.testing.assert_close(rope(odd_step, torch.arange(5)), rope(odd_step.contiguous(), torch.arange(5)))


RISING = [1 + j / 4 for j in range(32)]


@pytest.mark.parametrize(
    ("scaling", "theirs"),
    [
        ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"kind": "yarn", "factor": 8.0, "original_length": 2048},
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048},
        ),
        (
            {"kind": "yarn", "factor": 2.0, "original_length": 64, "slow": 2, "fast": 16, "sharpen": 1.5},
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "beta_slow": 2,
                "beta_fast": 16,
                "attention_factor": 1.5,
            },
        ),
        (
            {"kind": "llama3", "factor": 8.0, "original_length": 8192},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        ({"kind": "p_rope", "keep": 0.25}, {"rope_type": "proportional", "partial_rotary_factor": 0.25}),
        (
            {"kind": "longrope", "factor": 8.0, "factors": RISING, "original_length": 2048},
            {
                "rope_type": "longrope",
                "factor": 8.0,
                "long_factor": RISING,
                "short_factor": RISING,
                "original_max_position_embeddings": 2048,
            },
        ),
    ],
)
def test_scaled_frequencies_are_those_of_transformers(scaling: dict[str, Any], theirs: dict[str, Any]) -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters={**theirs, "rope_theta": 500000.0})
    expected, sharpen = rope_utils.ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, "cpu")
    found, factor = rope_frequencies(64, 500000.0, RopeScaling(**scaling))
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-12)
    assert factor == pytest.approx(sharpen)


def test_ntk_divides_the_lowest_frequency_by_the_factor_and_leaves_the_highest() -> None:
    plain, _ = rope_frequencies(32)
    scaled, _ = rope_frequencies(32, scaling=RopeScaling(kind="ntk", factor=4.0))
    torch.testing.assert_close(scaled[[0, -1]], plain[[0, -1]] / torch.tensor([1.0, 4.0]))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"kind": "yarn", "factor": 2.0}, "yarn needs the tokens of the training"),
        ({"kind": "p_rope", "factor": 2.0}, "factor: p_rope does not take it; it takes keep"),
        ({"kind": "linear", "keep": 0.5}, "keep: linear does not take it"),
        ({"kind": "linear", "factor": 2.0, "original_length": 5}, "original_length: linear does not take it"),
        (
            {"kind": "llama3", "factor": 4.0, "original_length": 32, "slow": 8},
            "slow: 8 turns are not fewer than fast = 4",
        ),
        ({"kind": "longrope", "factor": 2.0, "original_length": 8}, "factors: longrope needs one for each pair"),
        ({"kind": "linaer"}, "did you mean 'linear'?"),
    ],
)
def test_scalings_that_contradict_themselves_are_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        RopeScaling.parse(scaling)
    assert message in str(caught.value)
    from contextlab.mixers import build_mixer

    with pytest.raises(InputError, match=r"keep: 0\.1 of 2 pairs is less than one; the least that fits is 0\.5"):
        build_mixer("attention", width=16, rope_scaling={"kind": "p_rope", "keep": 0.1})
    with pytest.raises(InputError, match="rope_scaling changes rotary positions, but position is 'none'"):
        build_mixer("attention", width=16, position="none", rope_scaling={"kind": "linear", "factor": 2.0})


def naive_xpos(q: Any, k: Any, v: Any, size: int, scale_base: float, scale: float, first: int = 0) -> Any:
    """xPos pair by pair: q and k as they are, the last queries at the places of the last keys, which start at `first`.

    The decay is taken of the distance at once, so that no place is too large.
    """
    batch, length, heads, _ = q.shape
    held, group = k.shape[1], heads // k.shape[2]
    theta = [10000.0 ** (-2 * j / size) for j in range(size // 2)]
    zeta = [(2 * j / size + 0.4) / 1.4 for j in range(size // 2)]
    rows = []
    for b in range(batch):
        for i in range(length):
            for h in range(heads):
                n = first + held - length + i
                scores = []
                for m in range(first, n + 1):
                    one, other = q[b, i, h], k[b, m - first, h // group]
                    score = (one[size:] * other[size:]).sum()
                    for j in range(size // 2):
                        c, s = math.cos((n - m) * theta[j]), math.sin((n - m) * theta[j])
                        x, y = one[2 * j] * c - one[2 * j + 1] * s, one[2 * j + 1] * c + one[2 * j] * s
                        fade = zeta[j] ** ((n - m) / scale_base)
                        score = score + (x * other[2 * j] + y * other[2 * j + 1]) * fade
                    scores.append(score * scale)
                rows.append(torch.stack(scores).softmax(0) @ v[b, : n + 1 - first, h // group])
    return torch.stack(rows).view(batch, length, heads, v.shape[-1])


@pytest.mark.parametrize(("size", "scale_base"), [(6, 16.0), (4, 512.0)])
def test_xpos_by_its_definition(size: int, scale_base: float) -> None:
    make = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, h, 6, dtype=torch.float64, generator=make) for n, h in ((5, 4), (9, 2), (9, 2)))
    given = [x.requires_grad_() for x in (q, k, v)]

    def ours(q: Any, k: Any, v: Any) -> Any:
        turned = rotate(q, rope_table(torch.arange(4, 9), size, dtype=q.dtype))
        keys = rotate(k, rope_table(torch.arange(9), size, dtype=k.dtype))
        return xpos_attention(turned, keys, v, size, scale_base=scale_base, scale=0.3)

    got, expected = ours(*given), naive_xpos(q, k, v, size, scale_base, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    weight = torch.randn(got.shape, dtype=torch.float64, generator=make)
    for one, other in zip(*(torch.autograd.grad((y * weight).sum(), given) for y in (got, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_xpos_is_the_papers_algorithm_where_that_does_not_overflow() -> None:
    length, size = 260, 8  # three chunks at a scale of 16
    q, k, v = (torch.randn(1, length, 2, size, dtype=torch.float64) for _ in range(3))
    table = rope_table(torch.arange(length), size, dtype=torch.float64)
    q, k = rotate(q, table), rotate(k, table)
    zeta = (torch.arange(0, size, 2, dtype=torch.float64) / size + 0.4) / 1.4
    power = zeta.repeat_interleave(2) ** (torch.arange(length)[:, None, None] / 16)
    scores = torch.einsum("bihd,bjhd->bhij", q * power, k / power) / size**0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(xpos_attention(q, k, v, size, scale_base=16.0), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xpos_a_million_tokens_out(dtype: torch.dtype) -> None:
    start = 10**6
    q, k, v = (torch.randn(1, 7, 2, 8, dtype=torch.float64) for _ in range(3))
    at = torch.arange(start, start + 7)
    table = rope_table(at, 8, dtype=torch.float64)
    expected = naive_xpos(q, k, v, 8, 16.0, 8**-0.5, start)
    given = q, k, v = rotate(q, table).to(dtype), rotate(k, table).to(dtype), v.to(dtype)
    y = xpos_attention(q, k, v, 8, scale_base=16.0, q_position=at[None], k_position=at[None])
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    # A key a million tokens back is finite and has faded: its logit is 0, whatever it is.
    far = torch.tensor([[0, start]])
    keys = torch.stack((given[1][:, 0] * 1e4, given[1][:, 1] * 0), 1)
    y = xpos_attention(given[0][:, :1], keys, given[2][:, :2], 8, q_position=far[:, 1:], k_position=far)
    torch.testing.assert_close(y[:, 0], given[2][:, :2].mean(1), atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0)


def test_xpos_refuses_a_scale_in_which_a_chunk_would_overflow() -> None:
    x = torch.randn(1, 2, 1, 4)
    with pytest.raises(InputError, match="scale_base must be at least 16, got 8"):
        xpos_attention(x, x, x, 4, scale_base=8.0)


def test_carope_phases_by_their_definition() -> None:
    log_f = -torch.rand(2, 7, 3, dtype=torch.float64)
    before = torch.rand(2, 3, 4, dtype=torch.float64)
    mask = torch.arange(7) >= torch.tensor([2, 0])[:, None]
    total, last = carope_phases(log_f, 4, before, mask)
    for b in range(2):
        for h in range(3):
            for i in range(4):
                phase = before[b, h, i].item()
                for t in range(7):
                    phase += math.exp(log_f[b, t, h].item()) ** i * mask[b, t].item()
                    assert total[b, t, h, i].item() == pytest.approx(phase, rel=1e-12)
                assert last[b, h, i].item() == pytest.approx(phase % (2 * math.pi), abs=1e-12)
    given = (log_f.requires_grad_(), before.requires_grad_())
    assert torch.autograd.gradcheck(lambda log_f, before: carope_phases(log_f, 4, before, mask), given)


def test_carope_phases_a_million_tokens_out_are_exact_however_they_were_cut() -> None:
    log_f = -torch.rand(1, 10**6, 1)
    state: torch.Tensor | None = None
    for piece in log_f.split(10**5 + 7, 1):
        _, state = carope_phases(piece, 3, state)
    assert state is not None
    assert state.max() < 2 * math.pi
    for i in range(3):
        exact = math.fsum((log_f.double() * i).exp().flatten().tolist())
        difference = (state[0, 0, i].item() - exact) / (2 * math.pi)
        assert difference == pytest.approx(round(difference), abs=1e-9)


@pytest.mark.parametrize("size", [4, 8])
def test_clex_solves_its_equation(size: int) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    make = torch.Generator().manual_seed(5)
    up = torch.randn(size // 2, 6, dtype=torch.float64, generator=make) * 0.2
    down = torch.randn(6, size // 2, dtype=torch.float64, generator=make) * 0.05
    base, index = 10000.0, torch.arange(0, size, 2, dtype=torch.float64)

    def slope(t: float, z: Any) -> Any:
        """As the authors' code has it, in t."""
        alpha = 2 * t - 1
        theta = (base * alpha ** (size / (size - 2))) ** (-index / size)
        change = -2 * index / (size - 2) / (base ** (index / size) * alpha ** (index / (size - 2) + 1))
        net = torch.nn.functional.silu((torch.as_tensor(z) + theta.log()) @ up) @ down
        return (net + change / theta).numpy()

    start = (-index / size * math.log(base)).numpy()
    exact = integrate.solve_ivp(slope, (1, 12), start, t_eval=range(1, 13), rtol=1e-10, atol=1e-12)
    expected = torch.as_tensor(exact.y).mT.exp()
    found = torch.stack(clex_frequencies(12, size, base, up, down))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
    plain = torch.stack(
        [rope_frequencies(size, base, RopeScaling(kind="ntk", factor=2 * t - 1))[0] for t in range(1, 13)]
    )
    assert ((expected - plain).abs() > 1e-3 * plain).any()  # the network counts
    untrained = torch.stack(clex_frequencies(12, size, base, up, torch.zeros_like(down)))
    torch.testing.assert_close(untrained, plain, rtol=1e-12, atol=0)


def test_clex_is_differentiable() -> None:
    given = [torch.randn(shape, dtype=torch.float64) * 0.2 for shape in ((2, 3), (3, 2))]
    given = [x.requires_grad_() for x in given]
    assert torch.autograd.gradcheck(lambda up, down: clex_frequencies(3, 4, 100.0, up, down)[1:], given)
    with pytest.raises(InputError, match="at least 4 rotated dimensions, got 2; the nearest that fits is 4"):
        clex_frequencies(3, 2, 100.0, *given)


def gali_by_the_pseudo_code(length: int, original: int, window: int) -> list[float]:
    """Algorithm 2 of GALI, token by token."""
    group = math.ceil((length - window) / (original - window))
    places: list[float] = []
    i, total = 0, original
    while total < length:
        places += [i + j / group for j in range(group)]
        i += 1
        total = original - i + len(places)
    whole = list(range(i, original))
    return places[: length - len(whole)] + whole


@given(st.integers(2, 40), st.data())
def test_gali_places_are_those_of_the_pseudo_code(original: int, data: Any) -> None:
    window = data.draw(st.integers(1, original - 1))
    length = data.draw(st.integers(original, 6 * original))
    found = gali_places(torch.arange(length), length, original, window)
    expected = gali_by_the_pseudo_code(length, original, window)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert found[-window:].tolist() == list(range(original - window, original))
    assert gali_places(torch.arange(3), 2, original, window).tolist() == [0, 1, 2]  # a short sequence stays


def test_gali_interpolates_scores_between_whole_distances() -> None:
    q, k = torch.randn(1, 1, 2, 6, dtype=torch.float64), torch.randn(1, 4, 2, 6, dtype=torch.float64)
    at = torch.tensor([0.0, 0.25, 2.75, 4.0], dtype=torch.float64)
    turned = rotate(k, gali_table(at, 5, 4, 10000.0, k.dtype))
    query = rotate(q, rope_table(torch.tensor([7]), 4, dtype=q.dtype))
    scores = torch.einsum("bihd,bjhd->bhj", query, turned)
    for j, place in enumerate(at.tolist()):

        def score(distance: int, j: int = j) -> torch.Tensor:
            return torch.einsum("bhd,bhd->bh", rope(q, torch.tensor([distance]), fraction=0.67)[:, 0], k[:, j])

        r = 7 - place
        low, high = score(math.floor(r)), score(math.ceil(r))
        torch.testing.assert_close(scores[..., j], low - (low - high) * (r % 1))


@pytest.mark.parametrize("scaling", [None, RopeScaling(kind="yarn", factor=4.0, original_length=64)])
def test_the_table_of_one_place_is_that_of_all_places_there_in_any_order(scaling: RopeScaling | None) -> None:
    places = [0, 1, 63, 64, 65, 4095, 64, 4096, 127, 128, 0]  # block edges, forth and back
    whole = rope_table(torch.arange(4097), 8, 500.0, torch.float64, scaling)
    for place in places:
        one = step_table(place, 8, 500.0, torch.float64, scaling, torch.device("cpu"))
        assert one.shape == (1, 1, 4, 2)
        assert (one[0] - whole[place]).abs().max() < 1e-12


def test_a_table_made_in_inference_mode_is_not_handed_to_autograd() -> None:
    with torch.inference_mode():
        step_table(7, 8, 600.0, torch.float32, None, torch.device("cpu"))
    table = step_table(7, 8, 600.0, torch.float32, None, torch.device("cpu"))
    turned = rotate(torch.ones(1, 1, 1, 8, requires_grad=True), table)
    turned.sum().backward()  # raises on a tensor of inference mode
