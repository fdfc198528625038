"""Models: a stack of blocks built from a ModelSpec, presets, save and load."""

from typing import TYPE_CHECKING

from contextlab.lazy import modules_on_demand
from contextlab.models import hash_mlp as hash_mlp  # registers its MLP
from contextlab.models import mlp_experts as mlp_experts  # registers its MLP
from contextlab.models import presets as presets
from contextlab.models.build import build_model, preset
from contextlab.models.drafting import Drafted, DraftSpec, generate_drafted
from contextlab.models.exits import ExitSpec
from contextlab.models.forms import linear_layers, pack_forms, with_forms
from contextlab.models.hub import load
from contextlab.models.hub_model import HuggingFaceModel
from contextlab.models.hub_state import HuggingFaceSpec, HuggingFaceState
from contextlab.models.io import load_model, save_model
from contextlab.models.mlp import Mlp, build_mlp
from contextlab.models.outline import weight_nbytes
from contextlab.models.prefill import LazyPrefill, Prepacked
from contextlab.models.skip import SkipSpec
from contextlab.models.spec import LayerSpec, LinearSpec, MlpSpec, ModelSpec
from contextlab.models.stack import Model, ModelState
from contextlab.tokenizer import ByteTokenizer, load_tokenizer

if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "ByteTokenizer",
    "DraftSpec",
    "Drafted",
    "ExitSpec",
    "HuggingFaceModel",
    "HuggingFaceSpec",
    "HuggingFaceState",
    "LayerSpec",
    "LazyPrefill",
    "LinearSpec",
    "Mlp",
    "MlpSpec",
    "Model",
    "ModelSpec",
    "ModelState",
    "Prepacked",
    "SkipSpec",
    "build_mlp",
    "build_model",
    "generate_drafted",
    "linear_layers",
    "load",
    "load_model",
    "load_tokenizer",
    "pack_forms",
    "preset",
    "save_model",
    "weight_nbytes",
    "with_forms",
]
