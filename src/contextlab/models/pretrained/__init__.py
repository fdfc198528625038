"""Our models as `transformers` models: `AutoModelForCausalLM`, `model.generate`, `save_pretrained`, `from_pretrained`.

Importing this package registers the model type "contextlab"; it needs the package `transformers`.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from contextlab.models.pretrained.cache import CACHE, StateCache
from contextlab.models.pretrained.causal_lm import ContextlabForCausalLM
from contextlab.models.pretrained.config import ContextlabConfig

__all__ = ["CACHE", "ContextlabConfig", "ContextlabForCausalLM", "StateCache"]

AutoConfig.register("contextlab", ContextlabConfig, exist_ok=True)
AutoModelForCausalLM.register(ContextlabConfig, ContextlabForCausalLM, exist_ok=True)
# Trainer's label smoothing shifts the labels of classes that stand in this table only, and of others does not.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["contextlab"] = ContextlabForCausalLM.__name__
