"""Models: a stack of blocks built from a ModelSpec, presets, save and load."""

from contextlab.models import presets as presets
from contextlab.models.io import load_model, save_model
from contextlab.models.mlp import Mlp, build_mlp
from contextlab.models.spec import LayerSpec, MlpSpec, ModelSpec
from contextlab.models.stack import Model, ModelState, build_model, preset

__all__ = [
    "LayerSpec",
    "Mlp",
    "MlpSpec",
    "Model",
    "ModelSpec",
    "ModelState",
    "build_mlp",
    "build_model",
    "load_model",
    "preset",
    "save_model",
]
