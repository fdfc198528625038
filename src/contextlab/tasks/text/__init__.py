"""Tasks on text, of bytes or of any tokenizer's tokens: language modelling, and long context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contextlab.lazy import modules_on_demand
from contextlab.tasks.text.aggregation import ListAggregation
from contextlab.tasks.text.babilong import FactsInText
from contextlab.tasks.text.classification import TextClassification, TextRetrieval
from contextlab.tasks.text.codec import Codec, Tokenizer, codec
from contextlab.tasks.text.dictionaries import DictionaryRetrieval, KeyValueRetrieval
from contextlab.tasks.text.language import LanguageModelling
from contextlab.tasks.text.listops import ListOps
from contextlab.tasks.text.needle import Needle
from contextlab.tasks.text.ruler import Ruler

if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "Codec",
    "DictionaryRetrieval",
    "FactsInText",
    "KeyValueRetrieval",
    "LanguageModelling",
    "ListAggregation",
    "ListOps",
    "Needle",
    "Ruler",
    "TextClassification",
    "TextRetrieval",
    "Tokenizer",
    "codec",
]
