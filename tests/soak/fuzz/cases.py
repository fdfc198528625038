"""The generator: what a hurried, a confused and a hostile user may type, from one seed."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from contextlab import registry
from contextlab.evaluation.spec import CompressSpec, EvaluateSpec
from contextlab.experiments import ExperimentSpec, recipes
from contextlab.experiments.recipes import read_yaml
from contextlab.experiments.spec import ModelEntry, TaskEntry
from contextlab.models import ModelSpec
from contextlab.training import TrainSpec

NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 7, 64, 200, 10**6, 10**7, 2**31 - 1, 2**31, 10**20, -(2**63), 10**4000,
    0.5, -0.5, -0.0, 1e-320, 1e-31, 1e9, 1e38, 1e308, math.nan, math.inf, -math.inf,
]  # fmt: skip
WORDS = [
    "", " ", "yes", "none", "1e3", "0x10", "1_000", "1:30", "é🙂", "\u202eevil", "a" * 300, "x\ny", "\x1b[31mred",
    "../../etc", "a.b.c", "attention", "transformer", "linear_regression", "ridge", "needle", "10%", "²", "٣", "[", "{",
]  # fmt: skip
TEXTS = [
    "[", "{", "]", ":", "- ", "&a [*a]", "*b", "!!python/object/apply:os.system ['true']", "!!bool maybe", "!!int ''",
    "!!timestamp x", "2001-13-45", "{a: 1, a: 2}", "? [1]\n: 2", "%YAML 9.9", "\x00", "[" * 60, "[" * 3000, "'",
    '"\\x', "| \n a\n b", "<<: 1", "{<<: {a: 1}}", "!!binary aGk=", "!!set {a, b}", "~", "true", "False", "on",
    "9" * 5000, "0." + "1" * 5000, "1e99999", "-" * 100, "\ud800", "[1, 2", "{a: [1, {b: 2}]}", "!!float nan", ".inf",
]  # fmt: skip
NAMES = [
    "",
    " ",
    ".",
    "..",
    "/",
    "/dev/null",
    "/dev/zero",
    "nothing",
    "x" * 300,
    "x" * 5000,
    "a\tb",
    "é",
    "-",
    "--",
    "~",
]


@dataclass
class Case:
    """One thing that a user may do.

    arguments: of the command line; "@/" stands for the folder of the case.
    files: name -> content, written into the folder before.
    refused: whether the contracts name this as nonsense, so that it must be refused; why, in words.
    """

    arguments: list[str]
    files: dict[str, str | bytes] = field(default_factory=dict)
    refused: str = ""


class Generator:
    """Cases without end, the same for the same seed."""

    def __init__(self, seed: int, check: bool) -> None:
        """check: whether `contextlab run` knows --check; else a spec is only read."""
        self.random = random.Random(seed)
        self.run = ["run", "--check"] if check else ["load"]
        self.recipes = {recipe.name: read_yaml(recipe.path) for recipe in recipes()}
        self.models = registry.names("model")
        kinds: list[tuple[int, Callable[[], Case]]] = [
            (22, self.recipe), (22, self.change), (14, self.model), (12, self.task), (4, self.mixer),
            (4, self.learners), (4, self.listing), (6, self.folder), (4, self.policy), (6, self.words), (2, self.text),
        ]  # fmt: skip
        self.kinds = [make for weight, make in kinds for _ in range(weight)]

    def case(self) -> Case:
        return self.random.choice(self.kinds)()

    # Values.

    def value(self, deep: int = 0) -> Any:
        one = self.random.random()
        if one < 0.45:
            return self.random.choice(NUMBERS)
        if one < 0.6:
            return self.random.choice(WORDS)
        if one < 0.75 or deep > 3:
            return self.random.choice([None, True, False])
        if one < 0.87:
            return [self.value(deep + 1) for _ in range(self.random.randrange(4))]
        return {
            str(self.near(self.random.choice(WORDS))): self.value(deep + 1) for _ in range(self.random.randrange(3))
        }

    def fitting(self, entry: registry.Entry, name: str) -> Any:
        """A value of the type that an option has, though hardly one that it should have."""
        types = str(entry.options_model.model_fields[name].annotation)
        if "int" in types and self.random.random() < 0.8:
            # Not from 1000 to 131072: prompts and models of such sizes may take minutes, as was asked for.
            return self.random.choice([1, 2, 3, 5, 17, 100, 10**6, 10**8, 2**31 - 1])
        if "float" in types:
            return self.random.choice([0.0, 1e-30, 1e-6, 0.3, 1.0, 2.5, 100.0, 1e6, 1e9])
        return self.random.choice([*NUMBERS, *WORDS, None, True, False])

    def as_text(self, value: Any) -> str:
        """YAML in one line, as it is typed after --set."""
        if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 10_000:
            return "1" + "0" * 4000
        return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("\n").removesuffix("\n...")

    def near(self, name: str) -> str:
        """A name with a slip of the pen."""
        if not name:
            return "x"
        at = self.random.randrange(len(name))
        slips = [
            name[:at] + name[at + 1 :] or "y",
            name[:at] + name[at] + name[at:],
            name.upper(),
            name + "s",
            name.replace("_", "-"),
            name[:at] + "é" + name[at + 1 :],
            name + "\n",
        ]
        return self.random.choice(slips)

    def places(self, data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """The path of every value in a tree."""
        found = [path] if path else []
        items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
        for key, item in items:
            found += self.places(item, (*path, key))
        return found

    def pick(self, data: Any) -> tuple[tuple[Any, ...], Any]:
        """A path and the value there."""
        path = self.random.choice(self.places(data))
        value = data
        for key in path:
            value = value[key]
        return path, value

    def nonsense_for(self, value: Any) -> tuple[Any, str]:
        """A value in the place of this number that the contracts refuse, and why."""
        return self.random.choice(
            [
                (True, "true is no number"),
                (False, "false is no number"),
                (10**40, "larger than any number of float32"),
                (math.nan, "nan"),
                (math.inf, "infinite"),
                ("many", "a word is no number"),
                ({"a": 1}, "a mapping is no number"),
            ]
        )

    # Kinds of cases.

    def recipe(self) -> Case:
        """A recipe's file with one to three changes, or with damaged text."""
        data = copy.deepcopy(self.recipes[self.random.choice(list(self.recipes))])
        data["train"] = {**data.get("train", {})}
        wrong: list[tuple[str, list[Any]]] = []
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            why, path = self._change(data)
            wrong = [each for each in wrong if each[1][: len(path)] != path]  # what this change has replaced or dropped
            wrong += [(why, path)] if why else []
        refused = wrong[-1][0] if wrong else ""
        try:
            text = yaml.safe_dump(data, sort_keys=False, allow_unicode=self.random.random() < 0.5)
        except ValueError:  # a number of thousands of digits cannot be written
            text = "name: " + "9" * 5000
        content: str | bytes = text
        one = self.random.random()
        if one < 0.06:
            lines = text.splitlines()
            at = self.random.randrange(len(lines))
            if lines[at] and not lines[at].startswith((" ", "-")) and lines[at].partition(":")[0].isidentifier():
                key = lines[at].partition(":")[0]
                content, refused = f"{text}{key}: 1\n", "a key twice"
        elif one < 0.12:
            at = self.random.randrange(len(text))
            content, refused = text[:at] + self.random.choice(TEXTS) + text[at:], ""
            content = content.encode("utf-8", "surrogatepass")
        elif one < 0.15:
            raw = bytearray(text.encode())
            for _ in range(3):
                raw[self.random.randrange(len(raw))] = self.random.randrange(256)
            content, refused = bytes(raw), ""
        elif one < 0.17:
            bomb = "".join(f"b{i}: &b{i} [{','.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 9))
            content, refused = "b0: &b0 [1,1,1,1,1,1,1,1,1,1]\n" + bomb + text, "aliases that stand for too much"
        return Case([*self.run, "@/recipe.yaml"], {"recipe.yaml": content}, refused)

    def _change(self, data: dict[str, Any]) -> tuple[str, list[Any]]:
        """Change one value, key or structure of a tree. Returns why it must be refused, if it must, and the path."""
        path, value = self.pick(data)
        return self._change_at(data, path, value), list(path)

    def _change_at(self, data: dict[str, Any], path: Sequence[Any], value: Any) -> str:
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        one = self.random.random()
        if number and one < 0.4:
            parent[path[-1]], why = self.nonsense_for(value)
            return why if path[0] != "description" else ""
        if one < 0.75:
            parent[path[-1]] = self.value()
        elif one < 0.85 and isinstance(parent, dict):
            wrong = self.near(str(path[-1]))
            keys = [*map(str, parent), wrong]
            free = len(path) > 1 and path[-2] in ("tasks", "models", "multitask", "curriculum")
            parent[wrong] = parent.pop(path[-1])
            known = {*ExperimentSpec.model_fields, *TrainSpec.model_fields, *EvaluateSpec.model_fields}
            known |= {*TaskEntry.model_fields, *ModelEntry.model_fields, *CompressSpec.model_fields}
            if not free and wrong not in known and len(path) == 1 and wrong not in keys[:-1]:
                return f"no key {wrong!r}"
        elif isinstance(parent, dict):
            parent.pop(path[-1])
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(value))
        return ""

    def change(self) -> Case:
        """A recipe that comes with contextlab, with --set."""
        name = self.random.choice(list(self.recipes))
        data, arguments, refused = self.recipes[name], [], ""
        for _ in range(self.random.choice([1, 1, 2, 4])):
            path, value = self.pick(data)
            key = ".".join(map(str, path))
            number = isinstance(value, int | float) and not isinstance(value, bool)
            one = self.random.random()
            if number and one < 0.3:
                wrong, refused_here = self.nonsense_for(value)
                text, refused = f"{key}={self.as_text(wrong)}", refused or refused_here
                arguments += ["--set", text]
                break
            if one < 0.65:
                text = f"{key}={self.as_text(self.value())}"
            elif one < 0.8:
                text = f"{key}={self.random.choice(TEXTS)}"
            elif one < 0.9:
                text = f"{self.near(key)}={self.as_text(value)}"
            elif one < 0.95:
                fields = [*TrainSpec.model_fields, *(f"x.{f}" for f in EvaluateSpec.model_fields)]
                text = f"train.{self.random.choice(fields)}={self.as_text(self.value())}"
            else:
                text = self.random.choice(
                    ["", "=", "==", "a", ".=1", "a..b=1", "a." * 60 + "b=1", "name", "=x", "\x00=1"]
                )
            arguments += ["--set", text]
        return Case([*self.run, name, *arguments], refused=refused)

    def model(self) -> Case:
        """A preset's name or a ModelSpec's file, changed."""
        name = self.random.choice(self.models)
        own = [p.name for p in registry.lookup("model", name).parameters]
        fields = [*own, *own, *ModelSpec.model_fields]
        arguments: list[str] = ["cost", name, "--lengths", "8", "--repeats", "1"]
        one, refused = self.random.random(), ""
        if one < 0.1:
            arguments[1] = self.near(name)
        elif one < 0.25:
            spec: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "layers": [self._layer(), self._layer()]}
            spec[self.random.choice(list(ModelSpec.model_fields))] = self.value()
            text = yaml.safe_dump(spec) if "9" * 100 not in repr(spec) else "width: 3"
            return Case(["cost", "@/model.yaml", *arguments[2:]], {"model.yaml": text})
        for _ in range(self.random.choice([1, 1, 2])):
            key = self.random.choice(fields)
            if key in ("depth", "loops") and self.random.random() < 0.4:
                arguments += ["--set", f"{key}={self.random.choice([10**6, 2**31 - 1, 20_000])}"]
                refused = "more layers than a model may have"
            elif key in ("width", "depth", "heads", "loops") and self.random.random() < 0.4:
                wrong, refused = self.nonsense_for(1)
                arguments += ["--set", f"{key}={self.as_text(wrong)}"]
            else:
                value = self.value()
                if key in own and self.random.random() < 0.6:
                    value = self.fitting(registry.lookup("model", name), key)
                text = self.as_text(value) if self.random.random() < 0.85 else self.random.choice(TEXTS)
                arguments += ["--set", f"{key if self.random.random() < 0.9 else self.near(key)}={text}"]
                refused = ""
                break
        return Case(arguments, refused=refused)

    def _layer(self) -> Any:
        name = self.random.choice(registry.names("mixer"))
        if self.random.random() < 0.3:
            return name if self.random.random() < 0.7 else self.near(name)
        parameters = [p.name for p in registry.lookup("mixer", name).parameters]
        return {"mixer": name, "options": {self.random.choice(parameters): self.value()}}

    def mixer(self) -> Case:
        """A model of one mixer with one option of a number's extremes: nothing may hang or be a traceback."""
        name = self.random.choice(registry.names("mixer"))
        parameters = [p.name for p in registry.lookup("mixer", name).parameters if p.name != "width"]
        entry = registry.lookup("mixer", name)
        chosen = self.random.sample(parameters, min(len(parameters), self.random.choice([1, 1, 2])))
        options = {key: self.fitting(entry, key) for key in chosen}
        spec = {"width": 16, "depth": 1, "heads": 2, "layers": [{"mixer": name, "options": options}]}
        text = yaml.safe_dump(spec) if "0" * 100 not in repr(spec) else "width: 1"
        return Case(["cost", "@/model.yaml", "--lengths", "8", "--repeats", "1"], {"model.yaml": text})

    def task(self) -> Case:
        """A prompt of a task with changed options."""
        name = self.random.choice(registry.names("task"))
        parameters = [p.name for p in registry.lookup("task", name).parameters] or ["none"]
        arguments, refused = ["show", "task", name, "--sample"], ""
        for _ in range(self.random.choice([1, 1, 2])):
            key = self.random.choice(parameters)
            if self.random.random() < 0.15:
                key = self.near(key)
            value = self.random.choice(NUMBERS) if self.random.random() < 0.5 else self.value()
            if key in parameters and key != "none" and self.random.random() < 0.6:
                value = self.fitting(registry.lookup("task", name), key)
            arguments += ["--set", f"{key}={self.as_text(value)}"]
            if value in (10**20, -(2**63), 10**4000) and not isinstance(value, bool):
                refused = "larger than any whole number"
        if self.random.random() < 0.2:
            arguments += ["--preset", self.random.choice(["easy", "hard", "esy", "", "9"])]
        if self.random.random() < 0.2:
            arguments += ["--seed", str(self.random.choice(NUMBERS[:13]))]
        return Case(arguments, refused=refused)

    def learners(self) -> Case:
        name = self.random.choice(registry.names("task"))
        name = name if self.random.random() < 0.8 else self.near(name)
        parameters = (
            [p.name for p in registry.lookup("task", name).parameters] if name in registry.names("task") else []
        )
        arguments = ["learners", name, "--prompts", self.random.choice(["2", "3", "0", "-1", "x", "1e3", "2000000000"])]
        if parameters and self.random.random() < 0.6:
            arguments += [
                "--set",
                f"{self.random.choice(parameters)}={self.random.choice([0, 1, 2, -1, 4, 'x', True])}",
            ]
        if self.random.random() < 0.3:
            arguments += ["--by", self.random.choice(["position", "shot", "distance", "distanse", "", "é"])]
        if self.random.random() < 0.2:
            arguments += [
                "--out",
                self.random.choice(["@/r.parquet", "@/x" * 200, "/", "/proc/x/y", "@/a\tb/c.parquet"]),
            ]
        return Case(arguments)

    def listing(self) -> Case:
        kind = self.random.choice(
            ["mixers", "mlps", "models", "tasks", "learners", "policies", "conversions", "recipes", "mixer", "x", ""]
        )
        command = self.random.choice(["list", "show", "schema"])
        if command == "list":
            return Case(["list", kind, *self.random.choice([[], ["--json"], ["--jsn"], ["--plugin", "@/none.py"]])])
        if command == "schema":
            return Case(["schema", self.random.choice(["model", "experiment", "modle", "", "é", "train", "compress"])])
        singular = {"policies": "policy"}.get(kind, kind.removesuffix("s"))
        names = list(self.recipes) if singular == "recipe" else self._names(singular)
        name = self.random.choice([*names, *NAMES])
        return Case(["show", kind, name if self.random.random() < 0.6 else self.near(name)])

    def _names(self, kind: str) -> list[str]:
        return registry.names(kind) if kind in registry.kinds() else ["x"]

    def folder(self) -> Case:
        """A run or a saved model with one file damaged or replaced; see `worker.damage`."""
        tables = [f"{name}.parquet" for name in ("results", "facets", "similarity", "by_prompt")]
        run = ["record.json", "experiment.yaml", *tables, ".lock"]
        training = ["record.json", "results.parquet", ".lock"]
        step = ["model.json", "model.safetensors", "training.json", "training.safetensors"]
        of_run = [f"run/{name}" for name in [*run, "report.html", "learners/*.parquet"]]
        of_run += [f"run/trainings/*/{name}" for name in [*training, *(f"step_*/{name}" for name in step)]]
        of_saved = [f"saved/{name}" for name in step[:2]]
        how = self.random.choice(
            ["half", "empty", "noise", "flip", "missing", "folder", "link", "dangling", "pipe", "list", "null", "other"]
        )
        small = ["--policy", "snapkv", "--budget", "50%", "--prompts", "2", "--lengths", "200", "--task", "needle"]
        files, command = self.random.choice(
            [
                (of_run, ["report", "@/run", "--out", "@/all.html"]),
                (of_run, ["similarity", "@/run", "--task", "regression", "--prompts", "4"]),
                (of_run, ["run", "@/run", "--resume", "--jobs", "1"]),
                (of_run, ["run", "@/run", "--resume", "--jobs", "1"]),
                (of_run, ["compress", "@/run/trainings/recall.softmax.seed0", *small]),
                (of_saved, ["cost", "@/saved", "--lengths", "8", "--repeats", "1"]),
                (of_saved, ["compress", "@/saved", *small]),
            ]
        )
        return Case([f"damage {self.random.choice(files)} {how} {self.random.randrange(10**6)}", *command])

    def policy(self) -> Case:
        name = self.random.choice(registry.names("policy"))
        parameters = [p.name for p in registry.lookup("policy", name).parameters] or ["x"]
        text = self.random.choice(
            [
                name,
                f"{name}:{self.random.choice(parameters)}={self.as_text(self.value())}",
                f"{self.near(name)}",
                f"{name}|{self.random.choice(registry.names('policy'))}",
                f"0={name}; {self.random.choice(['none', 'snapkv', 'x', ''])}",
                self.random.choice(
                    [*WORDS, ":", "|", ";", "a:b", "a=b", "snapkv:", "snapkv:=", "snapkv:window", "a:b=[", "||"]
                ),
            ]
        )
        budget = self.random.choice(
            ["50%", "10tok", "1kB", "0%", "-1%", "1e400%", "nan%", "x", "", "101%", "٣%", "9" * 400 + "tok"]
        )
        more = ["--prompts", "2", "--lengths", self.random.choice(["200"] * 5 + ["0", "²", "1k,x", "99999999999"])]
        budget = budget if self.random.random() < 0.5 else "50%"
        more += [
            "--task",
            self.random.choice(["needle", "needle", "kv_retrieval", "needle:depth=2", "mqar:", "x", "text:a=b"]),
        ]
        return Case(["compress", "@/saved", "--policy", text, "--budget", budget, *more])

    def words(self) -> Case:
        """Words in any order."""
        commands = ["run", "list", "show", "learners", "similarity", "report", "cost", "compress", "doctor", "schema"]
        options = ["--set", "--out", "--plugin", "--json", "--resume", "--quick", "--jobs", "--device", "--lengths"]
        pool = [*NAMES, *WORDS, *options, *map(str, NUMBERS[:15]), "demo", "--help", "--check", "--version", "@/saved"]
        words = [self.random.choice(pool) for _ in range(self.random.randrange(4))]
        command = self.random.choice([*commands, "check", "evaluate", self.near(self.random.choice(commands))])
        if command == "run" or command.startswith("eval"):
            words = [*words, *([] if self.run[0] == "load" else ["--check"])]
            if self.run[0] == "load" or "--check" not in words:
                command = "cost"  # without --check a run would train
        if command in ("check",):
            words = [*words, "--help"]
        return Case([command, *words])

    def text(self) -> Case:
        """A recipe's file that is none."""
        content = self.random.choice([*TEXTS, *map(str, NUMBERS[:15])]).encode("utf-8", "surrogatepass")
        return Case([*self.run, "@/recipe.yaml"], {"recipe.yaml": content}, "no recipe")


def write_files(case: Case, folder: Path) -> list[str]:
    """Write a case's files. Returns its arguments with the folder in them."""
    for name, content in case.files.items():
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (folder / name).write_bytes(data)
    return [argument.replace("@/", f"{folder}/") for argument in case.arguments]
