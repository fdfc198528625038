"""n-gram heads against their definition, and in a model."""

from __future__ import annotations

import pytest
import torch

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.static import ngram as module
from contextlab.models import build_model


def defined(ids: list[int], x: torch.Tensor, n: int) -> torch.Tensor:
    """The means of what followed, place by place."""
    rows = []
    for t in range(len(ids)):
        found = [
            x[j + 1] for j in range(n - 1, t - 1) if t >= n - 1 and ids[j - n + 1 : j + 1] == ids[t - n + 1 : t + 1]
        ]
        rows.append(torch.stack(found).mean(0) if found else torch.zeros_like(x[0]))
    return torch.stack(rows)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("block", [4, 512])
def test_what_is_read_is_what_followed_the_same_tokens(n: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    rng = torch.Generator().manual_seed(n)
    ids = torch.randint(0, 3, (2, 30), generator=rng)
    x = torch.randn(2, 30, 4, dtype=torch.float64, generator=rng)
    mixer = build_mixer("ngram", width=4, n=n).double()
    y, _ = mixer(x, tokens=ids)
    for row in range(2):
        expected = mixer.v_proj(defined(ids[row].tolist(), x[row], n)) + mixer.own_proj(x[row])
        torch.testing.assert_close(y[row], expected, rtol=0, atol=1e-12)
    first, state = mixer(x[:, :11], tokens=ids[:, :11])
    rest = [first]
    for t in range(11, 30):
        one, state = mixer(x[:, t : t + 1], state, tokens=ids[:, t : t + 1])
        rest.append(one)
    torch.testing.assert_close(torch.cat(rest, 1), y, rtol=0, atol=1e-12)


def test_a_model_hands_its_tokens_to_the_heads() -> None:
    spec = {
        "layers": [{"mixer": "ngram", "options": {"n": 2}}, "attention"], "width": 16, "heads": 2, "depth": 2,
        "read_in": "token", "input_size": 5, "output_size": 5, "position": "rope",
    }  # fmt: skip
    model = build_model(spec).double()
    tokens = torch.randint(0, 5, (2, 20))
    whole = model(tokens)
    head, state = model.read(tokens[:, :13])
    tail, _ = model.read(tokens[:, 13:], state)
    torch.testing.assert_close(torch.cat((head, tail), 1), whole, rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="mixer 'ngram' reads token ids, but the model reads vectors"):
        build_model({**spec, "read_in": "vector"})


def test_missing_tokens_are_named() -> None:
    mixer = build_mixer("ngram", width=4)
    with pytest.raises(InputError, match=r"NGram reads token ids: expected tokens \[1, 3\], got none"):
        mixer(torch.randn(1, 3, 4))


def test_it_is_no_member_of_parallel_heads() -> None:
    with pytest.raises(InputError, match="'ngram' reads token ids; make it a layer of its own"):
        build_mixer("parallel", width=8, mixers=["attention", "ngram"])
