"""What a KV state keeps: policies for any softmax attention model, budgeted in bytes."""

from importlib import import_module
from pkgutil import walk_packages
from typing import TYPE_CHECKING

from contextlab.lazy import modules_on_demand
from contextlab.policies.core.adapters import Adapter, register_adapter, register_adapter_of
from contextlab.policies.core.base import Policy, Served
from contextlab.policies.core.budget import Budget
from contextlab.policies.core.holders import Dense, Holder
from contextlab.policies.core.parse import parse_options, parse_policy, takes_budget
from contextlab.policies.core.per_layer import PerLayer
from contextlab.policies.core.slots import KeptState, Slots
from contextlab.policies.eviction.anchors import AnLLM
from contextlab.policies.eviction.base import EvictionPolicy
from contextlab.policies.eviction.by_attention import A2SF, ALISA, H2O, TOVA, VATP, PyramidInfer, PyramidKV, SnapKV
from contextlab.policies.eviction.by_estimate import ExpectedAttention, HashEvict
from contextlab.policies.eviction.by_key import KeyDiff, KeyNorm, Random, StreamingLLM
from contextlab.policies.eviction.dmc import DMC
from contextlab.policies.eviction.fastgen import FastGen
from contextlab.policies.eviction.head_budgets import AdaKV
from contextlab.policies.eviction.kvzip import KVzip
from contextlab.policies.eviction.merged_slots import MergedState
from contextlab.policies.eviction.merging import D2O, CaM, WeightedKV
from contextlab.policies.eviction.oracle import Oracle
from contextlab.policies.eviction.paged import PagedState
from contextlab.policies.eviction.seen import Seen
from contextlab.policies.eviction.trained import Locret
from contextlab.policies.prompt.infinite_retrieval import infinite_retrieval
from contextlab.policies.prompt.shorten import ShortPrompt, compress_prompt, evaluator_heads
from contextlab.policies.prompt.star_attention import StarAttention
from contextlab.policies.reading.by_page import BlockTopK, Quest
from contextlab.policies.reading.infllm import BlockState, InfLLM
from contextlab.policies.reading.retrieval import LowRankKeys, Retrieval, TopK
from contextlab.policies.reading.selective import ReadState, SelectivePolicy
from contextlab.policies.reading.specache import CopiedState, SpeCache
from contextlab.policies.storage.clusters import CHAI, ClusteredState
from contextlab.policies.storage.low_rank import LowRank
from contextlab.policies.storage.offload import HeadOffload
from contextlab.policies.storage.quantize import FP8, Quantize
from contextlab.policies.storage.shared_prefix import SharedPrefix, SharedPrefixState
from contextlab.registry import lookup

register_adapter_of("transformers", f"{__name__}.huggingface")
for _module in walk_packages(__path__, f"{__name__}."):  # every file of the folders is imported, and so registers
    if not _module.name.startswith(f"{__name__}.huggingface"):  # these two need transformers
        import_module(_module.name)


def build_policy(name: str, **options: object) -> Policy:
    """The registered policy called `name`. Raises InputError with the nearest name, or on impossible options."""
    policy: Policy = lookup("policy", name).build(**options)
    return policy


if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "A2SF",
    "ALISA",
    "CHAI",
    "D2O",
    "DMC",
    "FP8",
    "H2O",
    "TOVA",
    "VATP",
    "AdaKV",
    "Adapter",
    "AnLLM",
    "BlockState",
    "BlockTopK",
    "Budget",
    "CaM",
    "ClusteredState",
    "CopiedState",
    "Dense",
    "EvictionPolicy",
    "ExpectedAttention",
    "FastGen",
    "HashEvict",
    "HeadOffload",
    "Holder",
    "InfLLM",
    "KVzip",
    "KeptState",
    "KeyDiff",
    "KeyNorm",
    "Locret",
    "LowRank",
    "LowRankKeys",
    "MergedState",
    "Oracle",
    "PagedState",
    "PerLayer",
    "Policy",
    "PyramidInfer",
    "PyramidKV",
    "Quantize",
    "Quest",
    "Random",
    "ReadState",
    "Retrieval",
    "Seen",
    "SelectivePolicy",
    "Served",
    "SharedPrefix",
    "SharedPrefixState",
    "ShortPrompt",
    "Slots",
    "SnapKV",
    "SpeCache",
    "StarAttention",
    "StreamingLLM",
    "TopK",
    "WeightedKV",
    "build_policy",
    "compress_prompt",
    "evaluator_heads",
    "infinite_retrieval",
    "parse_options",
    "parse_policy",
    "register_adapter",
    "register_adapter_of",
    "takes_budget",
]
