"""What a KV state keeps: policies for any softmax attention model, budgeted in bytes."""

from typing import TYPE_CHECKING

from contextlab.lazy import modules_on_demand
from contextlab.policies.adaptive import AdaKV, PagedState
from contextlab.policies.anchors import AnLLM
from contextlab.policies.base import Dense, Holder, Policy, Served
from contextlab.policies.budget import Budget
from contextlab.policies.clusters import CHAI, ClusteredState
from contextlab.policies.compose import PerLayer
from contextlab.policies.dmc import DMC, MergedState
from contextlab.policies.estimates import ExpectedAttention, HashEvict
from contextlab.policies.eviction import EvictionPolicy, Seen
from contextlab.policies.foresight import KVzip, Oracle
from contextlab.policies.held import KeptState, Slots
from contextlab.policies.infinite import infinite_retrieval
from contextlab.policies.infllm import BlockState, InfLLM
from contextlab.policies.keys import KeyDiff, KeyNorm, Random, StreamingLLM
from contextlab.policies.low_rank import LowRank
from contextlab.policies.merging import D2O, CaM, WeightedKV
from contextlab.policies.offload import HeadOffload
from contextlab.policies.parse import parse_options, parse_policy, takes_budget
from contextlab.policies.prompt import ShortPrompt, compress_prompt, evaluator_heads
from contextlab.policies.quantize import FP8, Quantize
from contextlab.policies.retrieval import LowRankKeys, Retrieval, TopK
from contextlab.policies.scores import A2SF, ALISA, H2O, TOVA, VATP, FastGen, PyramidInfer, PyramidKV, SnapKV
from contextlab.policies.selective import BlockTopK, Quest, ReadState, SelectivePolicy
from contextlab.policies.sharing import SharedPrefix, SharedPrefixState
from contextlab.policies.specache import CopiedState, SpeCache
from contextlab.policies.star import StarAttention
from contextlab.policies.trained import Locret
from contextlab.registry import lookup


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
    "takes_budget",
]
