"""Tasks: what prompts are drawn, what is scored, which learners solve them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from contextlab import registry
from contextlab.lazy import modules_on_demand
from contextlab.prompt import Prompt, Task
from contextlab.tasks.arithmetic import Arithmetic
from contextlab.tasks.automata import RandomAutomata
from contextlab.tasks.bandits import Bandit, LinearBandit
from contextlab.tasks.bandwidth import Bandwidth, CountAndCopy
from contextlab.tasks.best_subset import BestSubset
from contextlab.tasks.boolean import BooleanFunctions
from contextlab.tasks.bursty import BurstyClassification
from contextlab.tasks.chain import ChainOfThought
from contextlab.tasks.classification import LogisticClassification, SoftmaxClassification
from contextlab.tasks.copying import Copy, SelectiveCopy
from contextlab.tasks.darkroom import DarkRoom
from contextlab.tasks.dynamical_systems import DynamicalSystem
from contextlab.tasks.entity_boxes import EntityBoxes
from contextlab.tasks.formal import FormalLanguage
from contextlab.tasks.functions import DecisionTrees, HermiteRegression, QuadraticRegression
from contextlab.tasks.hmm import HMMMixture
from contextlab.tasks.induction_head import InductionHead
from contextlab.tasks.logic_puzzle import LogicPuzzle
from contextlab.tasks.long_multiplication import LongMultiplication
from contextlab.tasks.machines import TuringMachine
from contextlab.tasks.mad import MadNoisyRecall, MadRecall
from contextlab.tasks.mad_fuzzy import MadFuzzyRecall
from contextlab.tasks.mad_storage import MadCompression, MadMemorization
from contextlab.tasks.markov import BigramBackcopy, MarkovChain
from contextlab.tasks.mixtures import GaussianMixtureRegression, MixedRegression
from contextlab.tasks.multi_hop import MultiHop
from contextlab.tasks.networks import ReluNetwork, RepresentationRegression
from contextlab.tasks.outliers import OutlierRegression
from contextlab.tasks.pathfinder import Pathfinder
from contextlab.tasks.phonebook import Phonebook
from contextlab.tasks.pixels import PixelClassification
from contextlab.tasks.recall import AssociativeRecall
from contextlab.tasks.recall_variants import ChainedRecall, CompositionalRecall, MultiValueRecall, OverwrittenRecall
from contextlab.tasks.recursion import BinarySuccessor, TreeTraversal
from contextlab.tasks.regression import LinearRegression
from contextlab.tasks.series import FourierSeries, MonomialRegression, PolynomialSeries
from contextlab.tasks.sliding_window import SlidingWindow
from contextlab.tasks.spec import TaskSpec, preset_options
from contextlab.tasks.state_tracking import Counters, GroupWord
from contextlab.tasks.subleq import Subleq
from contextlab.tasks.superposition import Superposition
from contextlab.tasks.templates import SymbolTemplates
from contextlab.tasks.text import (
    DictionaryRetrieval,
    FactsInText,
    KeyValueRetrieval,
    LanguageModelling,
    ListAggregation,
    ListOps,
    Needle,
    Ruler,
    TextClassification,
    TextRetrieval,
)
from contextlab.tasks.time_series import Autoregression
from contextlab.tasks.vectors import VectorRecall
from contextlab.tasks.waves import WaveSeries

if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "Arithmetic",
    "AssociativeRecall",
    "Autoregression",
    "Bandit",
    "Bandwidth",
    "BestSubset",
    "BigramBackcopy",
    "BinarySuccessor",
    "BooleanFunctions",
    "BurstyClassification",
    "ChainOfThought",
    "ChainedRecall",
    "CompositionalRecall",
    "Copy",
    "CountAndCopy",
    "Counters",
    "DarkRoom",
    "DecisionTrees",
    "DictionaryRetrieval",
    "DynamicalSystem",
    "EntityBoxes",
    "FactsInText",
    "FormalLanguage",
    "FourierSeries",
    "GaussianMixtureRegression",
    "GroupWord",
    "HMMMixture",
    "HermiteRegression",
    "InductionHead",
    "KeyValueRetrieval",
    "LanguageModelling",
    "LinearBandit",
    "LinearRegression",
    "ListAggregation",
    "ListOps",
    "LogicPuzzle",
    "LogisticClassification",
    "LongMultiplication",
    "MadCompression",
    "MadFuzzyRecall",
    "MadMemorization",
    "MadNoisyRecall",
    "MadRecall",
    "MarkovChain",
    "MixedRegression",
    "MonomialRegression",
    "MultiHop",
    "MultiValueRecall",
    "Needle",
    "OutlierRegression",
    "OverwrittenRecall",
    "Pathfinder",
    "Phonebook",
    "PixelClassification",
    "PolynomialSeries",
    "Prompt",
    "QuadraticRegression",
    "RandomAutomata",
    "ReluNetwork",
    "RepresentationRegression",
    "Ruler",
    "SelectiveCopy",
    "SlidingWindow",
    "SoftmaxClassification",
    "Subleq",
    "Superposition",
    "SymbolTemplates",
    "Task",
    "TaskSpec",
    "TextClassification",
    "TextRetrieval",
    "TreeTraversal",
    "TuringMachine",
    "VectorRecall",
    "WaveSeries",
    "build_task",
]


def build_task(name: str, *, preset: str | None = None, **options: Any) -> Task:
    """The task called `name`, with the options of one of its presets and then `options`.

    Raises InputError on an unknown name and on wrong or impossible options.
    """
    entry = registry.lookup("task", name)
    task: Task = entry.build(**{**preset_options(entry, preset), **options})
    return task
