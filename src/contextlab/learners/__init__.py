"""Learners: reference algorithms that answer prompts without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from contextlab import registry
from contextlab.lazy import modules_on_demand
from contextlab.learners.aggregation import ExponentialWeights
from contextlab.learners.arithmetic import ArithmeticEvaluator
from contextlab.learners.automata import AutomataPosterior, AutomatonOracle, BaumWelch, HMMPosterior, Program
from contextlab.learners.bandits import (
    BestArmPosterior,
    GreedyArm,
    LowerConfidence,
    PosteriorMeanArm,
    ThompsonSampling,
    UpperConfidence,
)
from contextlab.learners.base import RegressionLearner
from contextlab.learners.bayes import BasisPosterior, BayesLearner, BayesMixture, MemberOracle, SparsePosterior
from contextlab.learners.boolean import (
    EarliestNeighbour,
    Elimination,
    LabelFrequency,
    LabelLearner,
    ParityElimination,
    Perceptron,
    Taught,
    TaughtParity,
    Winnow,
)
from contextlab.learners.boolean_posterior import HalfspaceMessages, HalfspacePosterior, LiteralPosterior
from contextlab.learners.bursty import ClassPosterior
from contextlab.learners.chain import ChainLearner
from contextlab.learners.classification import LogisticRegression, SoftmaxRegression
from contextlab.learners.copying import (
    ChainedLookup,
    Copier,
    MemorizedPairs,
    PerfectMemory,
    SegmentLookup,
    SelectiveCopier,
)
from contextlab.learners.darkroom import GoalPosterior
from contextlab.learners.gradient import GradientDescentPlusPlus, PreconditionedGradientDescent
from contextlab.learners.kernels import GaussianProcess, GaussianSmoother, KernelRidge, KernelSmoother
from contextlab.learners.linear_bandits import LinearThompson, LinUCB
from contextlab.learners.logic_puzzle import PuzzlePosterior
from contextlab.learners.naive_bayes import NaiveBayes, NaiveBayesPairs
from contextlab.learners.neighbours import PixelNeighbours
from contextlab.learners.networks import TwoLayerNetwork
from contextlab.learners.ngrams import (
    BackoffNgram,
    BigramBackcopyLearner,
    Induction,
    MarkovOracle,
    MarkovPosterior,
    OrderPosterior,
)
from contextlab.learners.outliers import FilteredRidge
from contextlab.learners.recall import Lookup
from contextlab.learners.regression import (
    Averaging,
    GradientDescent,
    Lasso,
    LeastSquares,
    NearestNeighbours,
    Newton,
    PoolPosterior,
    Ridge,
)
from contextlab.learners.single_index import SingleIndexFits, SingleIndexProcess
from contextlab.learners.sparse import OrthogonalMatchingPursuit
from contextlab.learners.subleq import SubleqInterpreter
from contextlab.learners.superposition import SuperpositionPosterior
from contextlab.learners.text import ContextNgram, ListOpsEvaluator, Reader
from contextlab.learners.time_series import ARLeastSquares, ARPosterior, LastValue
from contextlab.learners.tracing import CurveTracer
from contextlab.learners.trees import BoostedTrees, DecisionTree
from contextlab.learners.vectors import VectorLookup
from contextlab.learners.version_space import Halving, SampledFormulas, VersionSpace
from contextlab.prompt import Learner

if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "ARLeastSquares",
    "ARPosterior",
    "ArithmeticEvaluator",
    "AutomataPosterior",
    "AutomatonOracle",
    "Averaging",
    "BackoffNgram",
    "BasisPosterior",
    "BaumWelch",
    "BayesLearner",
    "BayesMixture",
    "BestArmPosterior",
    "BigramBackcopyLearner",
    "BoostedTrees",
    "ChainLearner",
    "ChainedLookup",
    "ClassPosterior",
    "ContextNgram",
    "Copier",
    "CurveTracer",
    "DecisionTree",
    "EarliestNeighbour",
    "Elimination",
    "ExponentialWeights",
    "FilteredRidge",
    "GaussianProcess",
    "GaussianSmoother",
    "GoalPosterior",
    "GradientDescent",
    "GradientDescentPlusPlus",
    "GreedyArm",
    "HMMPosterior",
    "HalfspaceMessages",
    "HalfspacePosterior",
    "Halving",
    "Induction",
    "KernelRidge",
    "KernelSmoother",
    "LabelFrequency",
    "LabelLearner",
    "Lasso",
    "LastValue",
    "Learner",
    "LeastSquares",
    "LinUCB",
    "LinearThompson",
    "ListOpsEvaluator",
    "LiteralPosterior",
    "LogisticRegression",
    "Lookup",
    "LowerConfidence",
    "MarkovOracle",
    "MarkovPosterior",
    "MemberOracle",
    "MemorizedPairs",
    "NaiveBayes",
    "NaiveBayesPairs",
    "NearestNeighbours",
    "Newton",
    "OrderPosterior",
    "OrthogonalMatchingPursuit",
    "ParityElimination",
    "Perceptron",
    "PerfectMemory",
    "PixelNeighbours",
    "PoolPosterior",
    "PosteriorMeanArm",
    "PreconditionedGradientDescent",
    "Program",
    "PuzzlePosterior",
    "Reader",
    "RegressionLearner",
    "Ridge",
    "SampledFormulas",
    "SegmentLookup",
    "SelectiveCopier",
    "SingleIndexFits",
    "SingleIndexProcess",
    "SoftmaxRegression",
    "SparsePosterior",
    "SubleqInterpreter",
    "SuperpositionPosterior",
    "Taught",
    "TaughtParity",
    "ThompsonSampling",
    "TwoLayerNetwork",
    "UpperConfidence",
    "VectorLookup",
    "VersionSpace",
    "Winnow",
    "build_learner",
]


def build_learner(name: str, **options: Any) -> Learner:
    """The learner called `name`. Raises InputError on an unknown name and on wrong or missing options."""
    learner: Learner = registry.lookup("learner", name).build(**options)
    return learner
