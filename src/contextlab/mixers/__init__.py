"""Mixers: `nn.Module`s that mix tokens, `(x, state) -> (y, state)`; one folder a family."""

from __future__ import annotations

from importlib import import_module
from pkgutil import walk_packages
from typing import Any

from pydantic import PositiveInt

from contextlab import registry
from contextlab.mixers.base import Mixer
from contextlab.mixers.delta.delta_net import DeltaNet, GatedDeltaNet
from contextlab.mixers.delta.kda import KimiDeltaAttention
from contextlab.mixers.delta.rwkv7 import Rwkv7
from contextlab.mixers.encoder.attention import EncoderAttention
from contextlab.mixers.encoder.disentangled import DisentangledAttention
from contextlab.mixers.encoder.fnet import FNet
from contextlab.mixers.encoder.linear import EncoderLinearAttention
from contextlab.mixers.encoder.linformer import Linformer
from contextlab.mixers.encoder.merged import MergedAttention
from contextlab.mixers.encoder.neighbourhood import NeighbourhoodAttention
from contextlab.mixers.encoder.performer import Performer
from contextlab.mixers.encoder.ponet import PoNet
from contextlab.mixers.hybrid.gated_window import GatedWindow
from contextlab.mixers.hybrid.lizard import Lizard
from contextlab.mixers.hybrid.parallel import Parallel
from contextlab.mixers.hybrid.window_linear import WindowLinear
from contextlab.mixers.linear.gla import GatedLinearAttention, Hgrn2, Rwkv6
from contextlab.mixers.linear.lawcat import Lawcat
from contextlab.mixers.linear.linear_attention import LightningAttention, LinearAttention, Retention
from contextlab.mixers.linear.log_linear import LogLinearAttention
from contextlab.mixers.linear.rodimus import Rodimus
from contextlab.mixers.linear.sse import SparseStateExpansion
from contextlab.mixers.linear.supra import Supra
from contextlab.mixers.recurrent.elementwise import Hgrn, MinGru, MinLstm, MlGru, RgLru
from contextlab.mixers.recurrent.gru_lstm import Gru, Lstm
from contextlab.mixers.recurrent.xlstm import Mlstm, Slstm
from contextlab.mixers.segment.hierarchical import HierarchicalMemory
from contextlab.mixers.segment.infini import InfiniAttention
from contextlab.mixers.segment.lm2 import Lm2
from contextlab.mixers.segment.recurrent_memory import RecurrentMemory
from contextlab.mixers.segment.sentinel import Sentinel
from contextlab.mixers.segment.transformer_xl import TransformerXL
from contextlab.mixers.softmax.attention import Attention
from contextlab.mixers.softmax.block_local import BlockLocal
from contextlab.mixers.softmax.carope import CaropeAttention
from contextlab.mixers.softmax.complex_attention import ComplexAttention
from contextlab.mixers.softmax.contextual import CopeAttention
from contextlab.mixers.softmax.fan_attention import FanAttention
from contextlab.mixers.softmax.forgetting import ForgettingAttention
from contextlab.mixers.softmax.latent import LatentAttention
from contextlab.mixers.softmax.rotary import ClexAttention, GaliAttention
from contextlab.mixers.softmax.shaped_attention import ShapedAttention
from contextlab.mixers.softmax.sliding_window import SlidingWindow
from contextlab.mixers.softmax.windows import MultiScaleWindow, SigmoidWindow
from contextlab.mixers.sparse.blocks import LandmarkAttention, MixtureOfBlocks
from contextlab.mixers.sparse.core_context import CoreContextAttention
from contextlab.mixers.sparse.native import NativeSparseAttention
from contextlab.mixers.sparse.topk import RoutingAttention, TopkAttention
from contextlab.mixers.state_space.mamba import Mamba
from contextlab.mixers.state_space.mamba2 import Mamba2
from contextlab.mixers.state_space.mamba3 import Mamba3
from contextlab.mixers.state_space.s4d import S4D
from contextlab.mixers.static.hyena import Hyena
from contextlab.mixers.static.ngram import NGram
from contextlab.mixers.static.token_shift import TokenShift
from contextlab.mixers.test_time.atlas import Atlas
from contextlab.mixers.test_time.memory_context import MemoryAsContext
from contextlab.mixers.test_time.mesa import MesaNet
from contextlab.mixers.test_time.titans import Titans
from contextlab.mixers.test_time.ttt import TttLinear, TttMlp

__all__ = [
    "S4D",
    "Atlas",
    "Attention",
    "BlockLocal",
    "CaropeAttention",
    "ClexAttention",
    "ComplexAttention",
    "CopeAttention",
    "CoreContextAttention",
    "DeltaNet",
    "DisentangledAttention",
    "EncoderAttention",
    "EncoderLinearAttention",
    "FNet",
    "FanAttention",
    "ForgettingAttention",
    "GaliAttention",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GatedWindow",
    "Gru",
    "Hgrn",
    "Hgrn2",
    "HierarchicalMemory",
    "Hyena",
    "InfiniAttention",
    "KimiDeltaAttention",
    "LandmarkAttention",
    "LatentAttention",
    "Lawcat",
    "LightningAttention",
    "LinearAttention",
    "Linformer",
    "Lizard",
    "Lm2",
    "LogLinearAttention",
    "Lstm",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MemoryAsContext",
    "MergedAttention",
    "MesaNet",
    "MinGru",
    "MinLstm",
    "Mixer",
    "MixtureOfBlocks",
    "MlGru",
    "Mlstm",
    "MultiScaleWindow",
    "NGram",
    "NativeSparseAttention",
    "NeighbourhoodAttention",
    "Parallel",
    "Performer",
    "PoNet",
    "RecurrentMemory",
    "Retention",
    "RgLru",
    "Rodimus",
    "RoutingAttention",
    "Rwkv6",
    "Rwkv7",
    "Sentinel",
    "ShapedAttention",
    "SigmoidWindow",
    "SlidingWindow",
    "Slstm",
    "SparseStateExpansion",
    "Supra",
    "Titans",
    "TokenShift",
    "TopkAttention",
    "TransformerXL",
    "TttLinear",
    "TttMlp",
    "WindowLinear",
    "build_mixer",
]

for _module in walk_packages(__path__, f"{__name__}."):  # every file of the folders is imported, and so registers
    import_module(_module.name)


def build_mixer(name: str, *, width: PositiveInt, **options: Any) -> Mixer:
    """Build a registered mixer.

    name: as `contextlab list mixers` prints it. width: size of a token's vector. options: the mixer's own.
    Raises InputError on unknown, ill-typed or impossible names and options, with the nearest valid choice.
    """
    mixer = registry.lookup("mixer", name).build(width=width, **options)
    assert isinstance(mixer, Mixer)
    return mixer
