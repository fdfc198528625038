"""Conversions: ways from a trained model to a cheaper one, each by name, and what they are calibrated on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from contextlab import registry
from contextlab.convert.base import Change, Conversion, Converted
from contextlab.convert.bits.calibrated import Awq, KeepOutliers
from contextlab.convert.bits.gptq import Gptq
from contextlab.convert.bits.nearest import Rotate, RoundToNearest
from contextlab.convert.bits.pack import Pack
from contextlab.convert.bits.torchao import TorchAo
from contextlab.convert.calibration import Calibration
from contextlab.convert.channels import Channels
from contextlab.convert.conversion import Transferred, convert
from contextlab.convert.depth.collapse import MergeBlocks
from contextlab.convert.depth.drop import DropBlocks
from contextlab.convert.depth.early import Calm, ExitAt
from contextlab.convert.depth.grow import Expand, Stack
from contextlab.convert.depth.mod import MixtureOfDepths
from contextlab.convert.depth.sublayers import DropSublayers
from contextlab.convert.heads import Heads
from contextlab.convert.kv.gqa import Gqa
from contextlab.convert.kv.mla import Mla
from contextlab.convert.kv.options import DropPosition, ScaledRope
from contextlab.convert.kv.reach import Clex, LongRope
from contextlab.convert.kv.share_kv import ShareKv
from contextlab.convert.kv.window import LightTransfer, Window
from contextlab.convert.linearize.feature_maps import T2R, HedgehogConversion
from contextlab.convert.linearize.gated import Liger, Radlads
from contextlab.convert.linearize.gated_features import LawcatConversion, LizardConversion
from contextlab.convert.linearize.kept_rotary import Lolcats, SupraConversion
from contextlab.convert.linearize.mamba import MambaInLlama, Mohawk
from contextlab.convert.linearize.plain import Linearize
from contextlab.convert.low_rank.svd import Asvd, Laser, Svd, SvdLlm
from contextlab.convert.merge import merge
from contextlab.convert.merging.methods import Average, Slerp, TaskArithmetic, Ties
from contextlab.convert.shrink import Shrunk, shrink
from contextlab.convert.slicing import Slice
from contextlab.convert.sparse.magnitude import Magnitude
from contextlab.convert.sparse.sparsegpt import SparseGpt
from contextlab.convert.sparse.wanda import Wanda
from contextlab.convert.teacher import Distil
from contextlab.convert.transfer import Stage
from contextlab.lazy import modules_on_demand

if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "T2R",
    "Asvd",
    "Average",
    "Awq",
    "Calibration",
    "Calm",
    "Change",
    "Channels",
    "Clex",
    "Conversion",
    "Converted",
    "Distil",
    "DropBlocks",
    "DropPosition",
    "DropSublayers",
    "ExitAt",
    "Expand",
    "Gptq",
    "Gqa",
    "Heads",
    "HedgehogConversion",
    "KeepOutliers",
    "Laser",
    "LawcatConversion",
    "Liger",
    "LightTransfer",
    "Linearize",
    "LizardConversion",
    "Lolcats",
    "LongRope",
    "Magnitude",
    "MambaInLlama",
    "MergeBlocks",
    "MixtureOfDepths",
    "Mla",
    "Mohawk",
    "Pack",
    "Radlads",
    "Rotate",
    "RoundToNearest",
    "ScaledRope",
    "ShareKv",
    "Shrunk",
    "Slerp",
    "Slice",
    "SparseGpt",
    "Stack",
    "Stage",
    "SupraConversion",
    "Svd",
    "SvdLlm",
    "TaskArithmetic",
    "Ties",
    "TorchAo",
    "Transferred",
    "Wanda",
    "Window",
    "build_conversion",
    "convert",
    "merge",
    "shrink",
]


def build_conversion(name: str, **options: Any) -> Conversion:
    """A registered conversion; called with a model (and, where it needs them, `Calibration` data) it converts it.

    name: as `contextlab list conversions` prints it. options: the conversion's own.
    Raises InputError on unknown, ill-typed or impossible names and options, with the nearest valid choice.
    """
    conversion: Conversion = registry.lookup("conversion", name).build(**options)
    return conversion
