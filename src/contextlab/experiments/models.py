"""Models by where they lie: a run, one of its trainings, a checkpoint, a saved model, a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from contextlab.errors import InputError, unknown
from contextlab.experiments.made_with import naming_plugins
from contextlab.experiments.recipes import find_recipe, load_recipe, recipe_files
from contextlab.experiments.starts import find_source, of_run, only_training
from contextlab.files import short
from contextlab.models import ByteTokenizer, HuggingFaceModel, Model, ModelSpec, load, load_tokenizer
from contextlab.models.io import SPEC
from contextlab.training.checkpoint import is_checkpoint, newest
from contextlab.training.checkpoint import load as load_checkpoint


def find_model(
    source: str | Path, device: torch.device | str = "cpu", *, native: bool = False
) -> tuple[str, Model | HuggingFaceModel, Any]:
    """A model's name, the model in evaluation mode, and its tokenizer (None for bytes).

    source: the folder of a run with one trained model, of one of its trainings, of a checkpoint, RUN:MODEL for one of
        several models of a run, or what `models.load` takes.
    native: in our own stack: the weights of a transformers checkpoint are imported.

    Raises InputError where there is none, where a run has several (it names their folders), or where an architecture
    cannot be imported.
    """
    folder = of_run(source) or Path(source)
    name = folder.resolve().name if folder.exists() else str(source).rsplit("/", 1)[-1]
    training = only_training(folder) if (folder / "trainings").is_dir() else folder
    if training.is_dir() and (last := newest(training)) is not None:
        folder = last
    elif folder.name.startswith("step_"):
        name = folder.resolve().parent.name
    model: Any
    with naming_plugins(folder):
        if is_checkpoint(folder):
            model = load_checkpoint(folder, device).eval()
        else:
            model = load(folder if folder.exists() else source, device=device, native=native).eval()
    tokenizer: Any = None
    if not is_checkpoint(folder) and not (folder / SPEC).exists():  # a checkpoint of transformers
        tokenizer = load_tokenizer(folder) if folder.exists() else str(source)
    return name, model, None if isinstance(tokenizer, ByteTokenizer) else tokenizer


def find_own_model(source: str | Path, device: torch.device | str = "cpu") -> Model:
    """The model that `find_model` finds, in our own stack: the weights of a transformers checkpoint are imported.

    Raises InputError where there is none, or where the checkpoint's architecture cannot be imported.
    """
    model = find_model(source, device, native=True)[1]
    assert isinstance(model, Model)
    return model


def is_recipe(text: str) -> bool:
    """Whether a text is RECIPE or RECIPE:MODEL: the name of one that is there, or a YAML file's."""
    name = text.partition(":")[0]
    return name in recipe_files() or name.endswith((".yaml", ".yml"))


def find_spec(text: str) -> ModelSpec:
    """The spec of a recipe's model (RECIPE or RECIPE:MODEL), on its first task, or of a trained one (`find_source`).

    Raises InputError where there is none, or several are meant.
    """
    if not is_recipe(text):
        return find_source(text, "", 0).spec
    recipe, _, model = text.partition(":")
    path = find_recipe(recipe)
    try:
        spec = load_recipe(path)
        jobs = {job.model: job for job in reversed(list(spec.measured()))}
    except InputError as error:  # beside other models of a command line it is the file that must be named
        raise InputError(str(error) if str(error).startswith(f"{short(path)}: ") else f"{recipe}: {error}") from None
    if model and model not in jobs:
        raise InputError(f"{recipe}: {unknown('model', model, jobs)}")
    if not model and len(jobs) > 1:
        raise InputError(f"{recipe}: has the models {', '.join(sorted(jobs))}; give one as {recipe}:MODEL")
    return spec.candidates(jobs[model or next(iter(jobs))])[0].model
