"""contextlab: what a sequence model learns from its context, what that context costs, what is lost when it is cheaper.

Names and modules are imported on first use: `import contextlab` and `contextlab --help` do not wait for PyTorch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from contextlab.lazy import modules_on_demand
from contextlab.threads import yield_cores

__version__ = "0.1.0"

_HOMES = {
    "build_mixer": "mixers",
    "build_mlp": "models",
    "build_model": "models",
    "build_task": "tasks",
    "build_learner": "learners",
    "build_policy": "policies",
    "build_conversion": "convert",
    "load_model": "models",
    "save_model": "models",
    "train": "training",
    "evaluate": "evaluation",
    "cost": "evaluation",
    "capture": "inspect",
    "patch": "inspect",
    "run": "experiments",
    "open_run": "experiments",
    "register": "registry",
    "Mixer": "mixers",
    "State": "state",
    "RecurrentState": "state",
    "Task": "prompt",
    "Prompt": "prompt",
    "Learner": "prompt",
    "Model": "models",
    "ModelSpec": "models",
    "TaskSpec": "tasks",
    "TrainSpec": "training",
    "EvaluateSpec": "evaluation",
    "ExperimentSpec": "experiments",
    "ContextlabError": "errors",
    "InputError": "errors",
}

if "torch" not in sys.modules:
    yield_cores()  # on a busy machine: OMP_WAIT_POLICY=passive, which torch reads when it is loaded

_module = modules_on_demand(__name__, __path__)

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from contextlab import allocator as allocator
    from contextlab import claims as claims
    from contextlab import cli as cli
    from contextlab import compat as compat
    from contextlab import constructions as constructions
    from contextlab import convert as convert
    from contextlab import errors as errors
    from contextlab import evaluation as evaluation
    from contextlab import experiments as experiments
    from contextlab import files as files
    from contextlab import inspect as inspect
    from contextlab import kinds as kinds
    from contextlab import learners as learners
    from contextlab import memory as memory
    from contextlab import mixers as mixers
    from contextlab import models as models
    from contextlab import ops as ops
    from contextlab import papers as papers
    from contextlab import places as places
    from contextlab import plugins as plugins
    from contextlab import policies as policies
    from contextlab import progress as progress
    from contextlab import prompt as prompt
    from contextlab import recipes as recipes
    from contextlab import registry as registry
    from contextlab import report as report
    from contextlab import spec as spec
    from contextlab import state as state
    from contextlab import strict_yaml as strict_yaml
    from contextlab import tasks as tasks
    from contextlab import testing as testing
    from contextlab import threads as threads
    from contextlab import tokenizer as tokenizer
    from contextlab import training as training
    from contextlab import words as words
    from contextlab.convert import build_conversion as build_conversion
    from contextlab.errors import ContextlabError as ContextlabError
    from contextlab.errors import InputError as InputError
    from contextlab.evaluation import EvaluateSpec as EvaluateSpec
    from contextlab.evaluation import cost as cost  # type: ignore[no-redef]
    from contextlab.evaluation import evaluate as evaluate  # type: ignore[no-redef]
    from contextlab.experiments import ExperimentSpec as ExperimentSpec
    from contextlab.experiments import open_run as open_run
    from contextlab.experiments import run as run  # type: ignore[no-redef]
    from contextlab.inspect import capture as capture
    from contextlab.inspect import patch as patch
    from contextlab.learners import build_learner as build_learner
    from contextlab.mixers import Mixer as Mixer
    from contextlab.mixers import build_mixer as build_mixer
    from contextlab.models import Model as Model
    from contextlab.models import ModelSpec as ModelSpec
    from contextlab.models import build_mlp as build_mlp
    from contextlab.models import build_model as build_model
    from contextlab.models import load_model as load_model
    from contextlab.models import save_model as save_model
    from contextlab.policies import build_policy as build_policy
    from contextlab.prompt import Learner as Learner
    from contextlab.prompt import Prompt as Prompt
    from contextlab.prompt import Task as Task
    from contextlab.registry import register as register
    from contextlab.state import RecurrentState as RecurrentState
    from contextlab.state import State as State
    from contextlab.tasks import TaskSpec as TaskSpec
    from contextlab.tasks import build_task as build_task
    from contextlab.training import TrainSpec as TrainSpec
    from contextlab.training import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        return _module(name)
    value = getattr(import_module(f"contextlab.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(each.name for each in iter_modules(__path__))})
