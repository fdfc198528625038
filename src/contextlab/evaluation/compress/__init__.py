"""What is lost, in quality, when a policy keeps a part of a model's context, and what is won."""

from contextlab.evaluation.compress.measure import compress
from contextlab.evaluation.compress.prompts import build_prompts, is_text
from contextlab.evaluation.compress.settings import FULL, OWN, Setting, check_settings

__all__ = ["FULL", "OWN", "Setting", "build_prompts", "check_settings", "compress", "is_text"]
