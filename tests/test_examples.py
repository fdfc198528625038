"""What the README tells newcomers to do works."""

from __future__ import annotations

from pathlib import Path

import torch

from contextlab import build_mixer, run
from contextlab.experiments import load_recipe
from contextlab.plugins import load_plugins

ROOT = Path(__file__).parent.parent


def test_the_example_mixer_keeps_the_split_law_and_joins_the_demo(tmp_path):
    load_plugins([str(ROOT / "examples" / "my_mixer.py")])
    mixer = build_mixer("forgetful_attention", width=16).double()
    x = torch.randn(2, 70, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(70)[None] >= torch.tensor([[0], [5]])
    with torch.no_grad():
        whole, state = mixer(x)
        first, before = mixer(x[:, :33])
        second, after = mixer(x[:, 33:], before)
        padded, _ = mixer(x, mask=mask)
        alone, _ = mixer(x[1:, 5:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(padded[1:, 5:], alone, rtol=0, atol=1e-9)
    assert state.nbytes == after.nbytes == mixer.state_nbytes(70, batch=2, dtype=torch.float64)

    changes = [
        "models={transformer: {preset: transformer}, mine: {spec: {layers: [forgetful_attention]}}}",
        "tasks.regression.train.steps=2",
        "tasks.recall.train.steps=2",
        "evaluate.prompts=8",
    ]
    done = run(load_recipe("demo", changes), out=tmp_path / "run")
    assert {r["status"] for r in done.records} == {"finished"}
    assert "mine" in set(done.results["model"])
