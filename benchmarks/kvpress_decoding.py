"""Decoding under an eviction policy, beside the same method and budget in NVIDIA's kvpress.

kvpress 0.5.5 wants transformers below 5.3, older than what this project runs with, so it needs an environment of its
own:

    python -m venv kvpress && kvpress/bin/pip install torch kvpress==0.5.5 jinja2 plotly pydantic pyarrow rich typer
    PYTHONPATH=src kvpress/bin/python benchmarks/kvpress_decoding.py [--length 16384] [--budget 10%] [--hidden 128 512]

A random Llama reads a prompt, from which a part of the cache is kept by the keys' norms; then tokens are decoded one by
one. kvpress evicts whenever an eighth of the budget was added to seven eighths, as contextlab does by default, so that
neither holds more than the budget. contextlab runs twice: at the attention of transformers' Llama, where kvpress runs,
and with the checkpoint as a model of its own, as `contextlab.models.load` reads it. All take turns in one process;
ratios are medians over turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import kvpress
import torch
import transformers
from rich.console import Console
from rich.table import Table

from contextlab.models import Model
from contextlab.models.imports import native_model
from contextlab.policies import Budget, build_policy, huggingface

mask_of_today = huggingface._mask


def mask_of_then(before: str, *, cache_position: torch.Tensor, **options: Any) -> Any:
    """transformers below 5.3 tells where the new tokens stand, and not how many they are."""
    return mask_of_today(before, q_length=len(cache_position), **options)


huggingface._mask = mask_of_then
huggingface.KeptLayer.get_max_cache_shape = huggingface.KeptLayer.get_max_length  # type: ignore[attr-defined]
huggingface.KeptLayer.__abstractmethods__ = frozenset()


def llama(hidden: int, layers: int) -> Any:
    """A random Llama with heads of 64 (of 32 where it is small), none of which share keys."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // (64 if hidden > 128 else 32),
        max_position_embeddings=32_768,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def decoded(model: Any, tokens: torch.Tensor, length: int) -> tuple[float, int]:
    """Seconds a decoded token, and how many tokens the first layer holds at the end."""
    cache = transformers.DynamicCache(config=model.config)
    model(tokens[:, :length], past_key_values=cache, use_cache=True, logits_to_keep=1)
    model(tokens[:, length : length + 1], past_key_values=cache, use_cache=True)
    began = time.perf_counter()
    for t in range(length + 1, tokens.shape[1]):
        model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
    seconds = (time.perf_counter() - began) / (tokens.shape[1] - length - 1)
    layer = cache.layers[0]
    held = layer.state.slots.used if hasattr(layer, "state") else layer.keys.shape[2]
    return seconds, held


def decoded_by_own(model: Model, tokens: torch.Tensor, length: int) -> tuple[float, int]:
    """As `decoded`, of a model of contextlab."""
    _, state = model.read(tokens[:, :length])
    _, state = model.read(tokens[:, length : length + 1], state)
    began = time.perf_counter()
    for t in range(length + 1, tokens.shape[1]):
        _, state = model.read(tokens[:, t : t + 1], state)
    seconds = (time.perf_counter() - began) / (tokens.shape[1] - length - 1)
    return seconds, state.layers[0].slots.used  # type: ignore[attr-defined]


@torch.no_grad()
def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--decoded", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    asked = Budget.of(options.budget)
    most = int(asked.amount * (options.length if asked.kind == "ratio" else 1))
    title = f"{options.length:,} tokens, at most {most:,} held, {torch.get_num_threads()} threads"
    columns = ("hidden size", "full ms", "kvpress ms", "contextlab ms", "times faster", "own model ms", "times faster")
    table = Table(*columns, "held", title=title)
    for hidden in options.hidden:
        model = llama(hidden, options.layers)
        own = native_model(model.config, dict(model.state_dict()), "llama").eval()
        tokens = torch.randint(256, (1, options.length + options.decoded), generator=torch.Generator().manual_seed(0))
        step = max(1, most // 8)
        torch.testing.assert_close(own(tokens[:, :64]), model(tokens[:, :64]).logits, rtol=1e-4, atol=1e-4)
        found: dict[str, list[float]] = {"full": [], "kvpress": [], "contextlab": [], "own": []}
        held = {}
        for _ in range(options.repeats):
            found["full"].append(decoded(model, tokens, options.length)[0])
            press = kvpress.PrefillDecodingPress(
                prefilling_press=kvpress.KnormPress(compression_ratio=1 - most / options.length),
                decoding_press=kvpress.DecodingPress(
                    base_press=kvpress.KnormPress(),
                    compression_interval=step,
                    target_size=most - step,
                    hidden_states_buffer_size=0,
                ),
            )
            with press(model):
                seconds, held["kvpress"] = decoded(model, tokens, options.length)
            found["kvpress"].append(seconds)
            policy = build_policy("key_norm", budget=f"{most}tok", sinks=0, window=1)
            with policy.attach(model):
                seconds, held["contextlab"] = decoded(model, tokens, options.length)
            found["contextlab"].append(seconds)
            with policy.attach(own):
                seconds, held["own"] = decoded_by_own(own, tokens, options.length)
            found["own"].append(seconds)
        middle = {name: f"{1000 * statistics.median(each):.2f}" for name, each in found.items()}
        table.add_row(
            str(hidden), middle["full"], middle["kvpress"], middle["contextlab"],
            spread(found["kvpress"], found["contextlab"]), middle["own"], spread(found["kvpress"], found["own"]),
            ", ".join(f"{each:,}" for each in held.values()),
        )  # fmt: skip
    Console(width=130).print(table)


def spread(slow: list[float], fast: list[float]) -> str:
    """How many times faster: the median over turns, the least and the most."""
    times = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(times):.2f} ({min(times):.2f}, {max(times):.2f})"


if __name__ == "__main__":
    main()
