"""What a GPU computes is what the CPU does: mixers, tasks, trainings, policies.

They run where there is a GPU, or on the device that CONTEXTLAB_TEST_DEVICE names (`cpu` to rehearse them);
`benchmarks/gpu.py` runs them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab import registry
from contextlab.models import build_model, load_model, preset
from contextlab.policies import parse_policy
from contextlab.tasks import build_task
from contextlab.testing import mixers, tasks
from contextlab.training import TrainSpec, train
from contextlab.training.checkpoint import newest
from contextlab.training.ensemble import Member, train_together

DEVICE = os.environ.get("CONTEXTLAB_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
pytestmark = pytest.mark.skipif(not DEVICE, reason="no GPU here, and CONTEXTLAB_TEST_DEVICE names no other device")
SPEC = TrainSpec(steps=6, batch=8, warmup=2, log_every=2, examples=16, learning_rate=0.01, precision="float32")


def close(found: Tensor, wanted: Tensor, within: float) -> None:
    """Within a part of the largest value wanted."""
    size = max(1e-6, float(wanted.detach().abs().max()))
    far = float((found.detach().cpu().to(wanted.dtype) - wanted.detach()).abs().max())
    assert far <= within * size, f"off by {far / size:.2e} of the largest value"


@pytest.fixture(autouse=True)
def _plain_products() -> Any:
    """float32 products in float32, not TF32."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed


@pytest.mark.parametrize("name", registry.names("mixer"))
def test_mixers_answer_as_on_the_cpu_whole_and_in_pieces(name: str) -> None:
    """Outputs and gradients in float32 on the device against float64 on the CPU."""
    component = next(mixers.cases(registry.lookup("mixer", name)))
    torch.manual_seed(0)
    exact = component.build().double().train()
    if exact.hard_choices or exact.amplifies_rounding:
        pytest.skip("what it picks, or writes next, depends on last digits")
    torch.manual_seed(0)
    ours = component.build().train().to(DEVICE)
    x = torch.randn(2, 70, mixers.WIDTH, dtype=torch.float64)
    wanted = exact(x, None, None, False)[0]
    given = x.float().to(DEVICE)
    found = ours(given, None, None, False)[0]
    assert found.device.type == torch.device(DEVICE).type
    close(found, wanted, 2e-3)
    theirs = [p for p in exact.parameters() if p.requires_grad]
    own = [p for p in ours.parameters() if p.requires_grad]
    if own:
        slopes = torch.autograd.grad(wanted.square().mean(), theirs, materialize_grads=True)
        got = torch.autograd.grad(found.square().mean(), own, materialize_grads=True)
        largest = max(float(each.abs().max()) for each in slopes)
        for ours_, wanted_ in zip(got, slopes, strict=True):
            assert float((ours_.cpu().double() - wanted_).abs().max()) <= 5e-3 * largest
    if exact.causal:
        with torch.no_grad():
            first, state = ours(given[:, :64])
            second, state = ours(given[:, 64:69], state)
            last, _ = ours(given[:, 69:], state)
        close(torch.cat((first, second, last), 1), wanted, 2e-3)


@pytest.mark.parametrize("name", registry.names("task"))
def test_tasks_draw_on_the_device(name: str) -> None:
    task = next(tasks.cases(registry.lookup("task", name))).build()
    prompt = task.sample(2, torch.Generator(DEVICE).manual_seed(0), DEVICE)
    wanted = torch.device(DEVICE).type
    assert {tensor.device.type for tensor in prompt.tensors().values()} == {wanted}
    again = task.sample(2, torch.Generator(DEVICE).manual_seed(0), DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(prompt.tensors().values(), again.tensors().values(), strict=True))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_training_on_fixed_prompts_is_that_of_the_cpu(optimizer: str, tmp_path: Path) -> None:
    task = build_task("linear_regression", dimensions=3, examples=6)
    spec = SPEC.model_copy(update={"optimizer": optimizer})
    make = lambda: build_model(preset("mamba", width=16, depth=1).for_task(task))  # noqa: E731
    wanted = train(make(), task, spec)
    found = train(make(), task, spec, device=DEVICE, folder=tmp_path)
    # Muon iterates in bfloat16 on CUDA
    within = 0.05 if optimizer == "muon" and DEVICE != "cpu" else 1e-3
    assert found.history["loss"].tolist() == pytest.approx(wanted.history["loss"].tolist(), rel=within)
    last = newest(tmp_path)
    assert last is not None
    assert next(load_model(last).parameters()).device.type == "cpu"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["transformer", "gated_delta_net"])
def test_trainings_go_together(name: str) -> None:
    task = build_task("linear_regression", dimensions=3, examples=6)
    spec = SPEC.model_copy(update={"examples": None, "optimizer": "adamw"})
    make = lambda seed: build_model(preset(name, width=16, depth=1, heads=2).for_task(task), seed=seed).double()  # noqa: E731
    models = [make(seed) for seed in range(2)]
    found = train_together([Member(m, task, spec, s) for s, m in enumerate(models)], device=DEVICE)
    for seed, model in enumerate(models):
        alone = make(seed)
        wanted = train(alone, task, spec, seed=seed, device=DEVICE)
        assert found[seed].history["loss"].tolist() == pytest.approx(wanted.history["loss"].tolist(), rel=1e-7)
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("text", ["streaming_llm", "snapkv", "h2o", "keydiff", "quest", "quantize:bits=4"])
def test_policies_answer_as_on_the_cpu(text: str) -> None:
    model = build_model(
        {"width": 32, "depth": 2, "heads": 4, "read_in": "token", "input_size": 32, "output_size": 32}
    ).double()
    tokens = torch.randint(32, (1, 200))
    found = []
    for device in ("cpu", DEVICE):
        model.to(device).eval()
        policy = parse_policy(text, None if ":" in text else "25%")
        with torch.no_grad(), policy.attach(model):
            _, state = model.read(tokens[:, :190].to(device))
            answers = []
            for t in range(190, 200):
                y, state = model.read(tokens[:, t : t + 1].to(device), state)
                answers.append(y)
        found.append((torch.cat(answers, 1).cpu(), state.nbytes))
    assert found[0][1] == found[1][1]
    close(found[1][0], found[0][0], 1e-6)
