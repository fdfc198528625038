"""Shrunk forms of one model: each foretold at once, and made when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from contextlab.convert.base import Conversion
from contextlab.convert.methods import as_list, calibration_of, read_method, tasks_of
from contextlab.convert.shrink import check_needs, planned, shrink
from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec
from contextlab.models.io import require_own
from contextlab.prompt import Task


@dataclass(frozen=True)
class Variant:
    """A shrunk form of a model's weights.

    text: as it was written. spec: of what comes out (see `Conversion.plan`).
    """

    text: str
    spec: ModelSpec
    model: Model = field(repr=False)
    methods: tuple[Conversion, ...] = ()
    data: Sequence[Task] = ()
    prompts: int = 64
    seed: int = 0

    def make(self) -> Model:
        """The model, in evaluation mode; the one that it is made from stays as it is."""
        data = calibration_of(None, self.data, self.model, self.prompts, self.seed)
        return shrink(self.model, list(self.methods), data, seed=self.seed).model.eval()


def read_variants(
    model: Model, texts: Sequence[str], data: Any = None, *, prompts: int = 64, seed: int = 0
) -> list[Variant]:
    """The forms that texts describe: "METHOD[:option=value,...]" as `shrink` takes it, "A|B" for one after the other.

    data: tasks, or files or folders of text, to calibrate on. prompts: of each. seed: of these and of what is drawn.

    Raises InputError, before anything is made, on methods that are unknown, need data that are not given, or do not fit
    the model, and on two texts that are the same.
    """
    require_own(model, "shrink")
    tasks = tasks_of(data, model)
    return [
        Variant(text, planned(methods, model.spec, bool(tasks)), model, methods, tasks, prompts, seed)
        for text, methods in read_forms(texts, bool(tasks))
    ]


def read_forms(texts: Sequence[str], calibrated: bool) -> list[tuple[str, tuple[Conversion, ...]]]:
    """The texts of `read_variants`, each with its methods. calibrated: whether there are data.

    Raises InputError as that does, but for what does not fit a model.
    """
    found: list[tuple[str, tuple[Conversion, ...]]] = []
    for text in as_list(texts):
        methods = tuple(read_method(part.strip(), "shrink") for part in text.split("|"))
        if same := next((other for other, known in found if known == methods), None):
            raise InputError(f"weights: {text} is given twice{f' (it is {same})' * (text != same)}; leave one out")
        check_needs(methods, calibrated)
        found.append((text, methods))
    return found
