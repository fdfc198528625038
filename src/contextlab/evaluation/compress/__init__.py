"""What is lost, in quality, when a policy keeps a part of a model's context, and what is won."""

from contextlab.evaluation.compress.measuring import compress, measure
from contextlab.evaluation.compress.prompts import build_prompts, check_prompts, is_text
from contextlab.evaluation.compress.settings import (
    FULL,
    OWN,
    WEIGHTS,
    Refusals,
    Setting,
    check_settings,
    settings_of,
    takes_budgets,
    weight_bytes,
)

__all__ = [
    "FULL",
    "OWN",
    "WEIGHTS",
    "Refusals",
    "Setting",
    "build_prompts",
    "check_prompts",
    "check_settings",
    "compress",
    "is_text",
    "measure",
    "settings_of",
    "takes_budgets",
    "weight_bytes",
]
