"""Models drawn with a seed, whatever other threads draw meanwhile."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import torch

from contextlab.models import Model, ModelSpec, build_model
from contextlab.models.build import preset
from contextlab.models.draws import OwnDraws
from contextlab.models.outline import without_memory
from contextlab.models.room import parameter_bytes

SIZES = {"width": 16, "depth": 2, "input_size": 3, "output_size": 3}


def numbers(seed: int) -> list[torch.Tensor]:
    """All parameters of a model whose parts are drawn in many ways."""
    layers = ["linear_attention", "rwkv6", "mamba2", "gru"]
    model = build_model({**SIZES, "depth": 4, "layers": layers, "position": "learned", "max_length": 9}, seed=seed)
    return [parameter.detach() for parameter in model.parameters()]


def test_threads_that_build_and_draw_get_the_models_of_one_thread() -> None:
    alone = [numbers(seed) for seed in range(3)]
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            torch.randn(7)
            torch.manual_seed(5)

    noise = threading.Thread(target=draw)
    noise.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            built = list(pool.map(numbers, [index % 3 for index in range(12)]))
    finally:
        done.set()
        noise.join()
    for index, model in enumerate(built):
        assert all(map(torch.equal, model, alone[index % 3])), index


def test_the_global_generator_is_neither_read_nor_set() -> None:
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    first = numbers(0)
    assert torch.randn(3).equal(expected)
    assert all(map(torch.equal, first, numbers(0)))
    assert not all(map(torch.equal, first, numbers(1)))


def test_the_numbers_are_those_of_the_global_generator_with_that_seed() -> None:
    spec = preset("transformer", **SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = Model(ModelSpec.parse(spec.model_dump()))
    built = build_model(spec, seed=3)
    assert all(map(torch.equal, built.parameters(), expected.parameters()))


def test_every_way_to_draw_is_served() -> None:
    def draws() -> list[torch.Tensor]:
        like = torch.full((4, 3), 0.5)
        made = [torch.randn(2, 3), torch.rand(4), torch.randperm(9), torch.randint(5, (6,)), torch.randint(2, 5, (6,))]
        made += [
            torch.randn_like(like),
            torch.rand_like(like),
            torch.randint_like(like, 9),
            torch.normal(0.0, 1.0, (3,)),
        ]
        made += [torch.empty(5).normal_(), torch.empty(5).uniform_(-1, 1), torch.empty(5).exponential_()]
        made += [torch.bernoulli(like), torch.multinomial(like, 2), torch.nn.functional.dropout(like)]
        made += [torch.nn.init.trunc_normal_(torch.empty(5)), torch.nn.init.orthogonal_(torch.empty(3, 3))]
        made += [
            torch.normal(like, 0.1),
            torch.normal(0.0, 1.0, (3,)),
            torch.empty(5).random_(9),
            torch.distributions.Gamma(like, like).sample(),
        ]
        return made

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        expected = draws()
        before = torch.random.get_rng_state()
        with OwnDraws(4):
            found = draws()
            own = torch.randn(3, generator=torch.Generator().manual_seed(8))
        assert torch.random.get_rng_state().equal(before)
    assert all(map(torch.equal, found, expected))
    assert own.equal(torch.randn(3, generator=torch.Generator().manual_seed(8)))


def test_building_a_model_imports_no_compiler() -> None:
    """Which takes a second. torch wraps what it keeps its compiler out of in a function that imports it when called."""
    assert not hasattr(OwnDraws.__torch_dispatch__, "__wrapped__")
    with patch.dict(sys.modules, {"torch._dynamo": None}):  # to import it is an error
        for layer in ("attention", "gated_delta_net", "mamba2", "rwkv7", "retention"):
            spec = preset("transformer", **SIZES, layers=[layer])
            outline = without_memory(spec)
            assert all(each.is_meta for each in outline.parameters()), layer
            assert parameter_bytes(spec) > 0.8 * outline.weight_nbytes, layer
        assert len(numbers(0)) > 4


def test_what_has_no_numbers_is_of_the_shapes_and_dtypes_that_numbers_have() -> None:
    def made() -> list[torch.Tensor]:
        ones, half = torch.ones(3, 1), torch.ones(2, dtype=torch.bfloat16)
        return [
            torch.randn(3, 2), torch.randn((2,), dtype=torch.float64), torch.arange(1, 7, 2), torch.linspace(0, 1, 5),
            torch.empty(3).uniform_(1, 16).log(), torch.arange(4) / 2, torch.arange(3).sqrt(), ones * torch.ones(2),
            half + torch.ones((), dtype=torch.float64), half + ones, ones > 0, half.mul_(torch.ones(())), 1 / ones,
            torch.where(ones > 0, half, 0.0), torch.arange(3) // torch.arange(1, 4), ones.clamp(min=half),
        ]  # fmt: skip

    with OwnDraws(0), torch.device("meta"):
        found = made()
    assert all(each.is_meta for each in found)
    assert [(each.shape, each.dtype) for each in found] == [(each.shape, each.dtype) for each in made()]
