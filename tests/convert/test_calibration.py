"""What a model is read on: moments against products by hand, losses against the task's, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab import build_model, build_task
from contextlab.convert import Calibration, calibration
from contextlab.convert.base import module_nbytes, relative_error
from contextlab.convert.layers import linear_layers
from contextlab.convert.methods import read_method
from contextlab.errors import InputError
from contextlab.testing.conversions import small_model, tokens


def caught(model, names, inputs):
    """The inputs [N, I] of layers, caught by hand."""
    found = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, x, y, name=name: found[name].append(x[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in inputs:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("mixer", ["attention", "mamba2", "mla"])
@pytest.mark.parametrize("at_once", [1 << 30, 8 * 16**2])
def test_moments_are_those_of_the_inputs(mixer, at_once, monkeypatch):
    monkeypatch.setattr(calibration, "AT_ONCE", at_once)  # one pass, and a pass for each layer
    model, x = small_model(mixer), tokens(9, 5)
    names = list(linear_layers(model))
    data = Calibration.of_tokens(x, batch=2)
    moments, rows = data.inputs_of(model, names), data.rows_of(model, names, 12)
    by_hand = caught(model, names, [part[:, :-1] for part in x.split(2)])
    assert names
    for name in names:
        torch.testing.assert_close(moments[name], by_hand[name].T @ by_hand[name])
        assert len(rows[name]) == 12
        assert (rows[name][:, None] == by_hand[name][None]).all(-1).any(1).all(), "rows are among the inputs"
    assert not any(layer._forward_pre_hooks for layer in linear_layers(model).values())


def test_the_loss_is_that_of_all_scored_positions():
    model, x = small_model(), tokens(9, 5)
    with torch.no_grad():
        expected = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert Calibration.of_tokens(x, batch=2).loss(model) == pytest.approx(float(expected))


def test_prompts_of_tasks_are_drawn_by_seed():
    task = build_task("associative_recall", pairs=4)
    data, again, other = (Calibration.of_task([task, task], 5, batch=3, seed=seed) for seed in (0, 0, 1))
    assert [prompt.batch for prompt, _ in data.batches] == [3, 2, 3, 2]
    assert data.tokens == 10 * data.batches[0][0].length
    for (a, _), (b, _), (c, _) in zip(data.batches, again.batches, other.batches, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert not torch.equal(a.inputs, c.inputs)
    assert not torch.equal(data.batches[0][0].inputs, data.batches[2][0].inputs)


def test_vectors_are_read_in_the_models_dtype():
    task = build_task("linear_regression", dimensions=3, examples=4)
    model = build_model({"width": 8, "depth": 1, "heads": 2}, **sizes(task)).double()
    data = Calibration.of_task(task, 4)
    data.check(model, [task])
    assert data.inputs_of(model, ["blocks.0.mlp.up"])["blocks.0.mlp.up"].shape == (8, 8)


def sizes(task):
    return {"input_size": task.input_size, "output_size": task.output_size, "read_in": task.read_in}


def test_data_that_do_not_fit_are_refused_in_one_line():
    model = small_model()
    for call, message in (
        (lambda: Calibration(()), "expected at least one batch of prompts"),
        (lambda: Calibration.of_tokens(torch.zeros(3, 1, dtype=torch.int64)), r"T at least 2, got \[3, 1\]"),
        (
            lambda: Calibration.of_tokens(torch.full((1, 3), 40)).check(model),
            "the model has 12 tokens, the data have one",
        ),
        (
            lambda: Calibration.of_task(build_task("linear_regression"), 2).check(model),
            "reads tokens, the data are vec",
        ),
        (lambda: Calibration.of_tokens(tokens()).check(model, [build_task("linear_regression")]), "read_in is 'token'"),
        (lambda: Calibration.of_task([], 2), "expected at least one batch"),
        (lambda: Calibration.of_task(build_task("copy"), 0), "prompts: expected a whole number of at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=message) as found:
            call()
        assert "\n" not in str(found.value)


def test_a_layer_that_no_data_reach_is_named():
    model = small_model()
    model.blocks[1].spare = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="the data never reach layer 'blocks.1.spare'"):
        Calibration.of_tokens(tokens()).inputs_of(model, ["blocks.1.spare"])


def test_errors_are_those_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    x, w, d = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (40, 3, 3))
    expected = float((x @ d.T).norm() / (x @ w.T).norm())
    assert relative_error(w, w - d, x.T @ x) == (pytest.approx(expected), "outputs")
    assert relative_error(w, w - d) == (pytest.approx(float(d.norm() / w.norm())), "weights")
    assert relative_error(w, w, x.T @ x) == (0.0, "outputs")
    assert relative_error(0 * w, 0 * w) == (0.0, "weights")


def test_bytes_of_weights_count_what_is_shared_once():
    spec = {"width": 8, "depth": 1, "heads": 2, "input_size": 7, "output_size": 7, "read_in": "token"}
    tied, untied = (
        module_nbytes(build_model({**spec, "tied": tied, "read_out_bias": False})) for tied in (True, False)
    )
    assert untied - tied == 4 * 7 * 8


@pytest.mark.parametrize(
    ("method", "mixer"),
    [
        ("gptq:group=8", "attention"),
        ("asvd", "mamba2"),
        ("sparsegpt", "encoder_attention"),
        ("channels", "gated_delta_net"),
        ("heads:share=0.5", "attention"),
    ],
)
def test_what_is_calibrated_block_by_block_goes_on_from_the_block_before(method, mixer, monkeypatch):
    """The same weights, bit for bit, and each block is read twice by a batch however deep the model is."""
    model, read, data = small_model(mixer, depth=5), [0], Calibration.of_tokens(tokens(9, 4), batch=2)
    for block in model.blocks:
        block.register_forward_hook(lambda *_: read.__setitem__(0, read[0] + 1))
    now = read_method(method, "shrink")(model, data).model
    calls, read[0] = read[0], 0
    monkeypatch.setattr(Calibration, "onward", lambda self: self)
    before = read_method(method, "shrink")(model, data).model
    assert all(torch.equal(each, now.state_dict()[name]) for name, each in before.state_dict().items())
    batches, twice = len(data.batches), 1 + (method == "asvd")
    assert calls == batches * (5 * twice + 4)  # each block as it was, then as it is, but for the last
    assert read[0] == batches * sum(range(1, 6)) * twice


def test_blocks_that_read_more_than_the_stream_are_read_from_the_start():
    layers = [{"mixer": "attention"}, {"mixer": "attention", "kv": "shared"}]
    sizes = {"read_in": "token", "input_size": 12, "output_size": 12, "width": 16, "depth": 4, "heads": 2}
    others = (
        {"loops": 2},
        {"layers": [{"mixer": "attention", "share": "all"}]},
        {"exit": {"threshold": 0.9}},
    )
    for changes in ({"layers": layers}, *others):
        model = build_model({**sizes, **changes}).double().eval()
        data, names = Calibration.of_tokens(tokens(9, 4)), [f"blocks.{i}.mlp.up" for i in range(len(model.blocks))]
        names = list(dict(linear_layers(model)).keys() & set(names))
        onward = data.onward()
        for name in sorted(names):
            assert torch.equal(onward.inputs_of(model, [name])[name], data.inputs_of(model, [name])[name])
