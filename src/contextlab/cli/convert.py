"""`contextlab convert`: a trained model with other mixers, or a smaller state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from contextlab.cli.arguments import read_lengths
from contextlab.cli.converted import (
    TIMED,
    TimeOption,
    TransformersOption,
    finish,
    require_time,
    show_bytes,
    show_compared,
    title_of,
)
from contextlab.cli.shared import PARTS, PluginOption, SetOption, console, going_on, load_components
from contextlab.cli.tables import print_table
from contextlab.errors import InputError, unknown
from contextlab.memory import LARGEST_WHOLE
from contextlab.words import counted

if TYPE_CHECKING:
    from contextlab.convert.base import Conversion
    from contextlab.convert.choice import Choice
    from contextlab.convert.conversion import Transferred
    from contextlab.convert.transfer import Stage


def convert(
    model: Annotated[
        str,
        typer.Argument(help="A saved model, a run, a checkpoint, a transformers folder that is imported."),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="MIXER|METHOD[:KEY=VALUE,...]|RECIPE:MODEL",
            help="What attention layers become; of a recipe's or a run's model, what stands at their place there. "
            "contextlab list conversions tells the methods, with their options and defaults.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the new model and convert.json; it must not be there yet.")],
    layers: Annotated[
        str | None,
        typer.Option(
            help="all, half, numbers such as 0,2,4, auto:N or gates:N, the N that cost least.", show_default="all"
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=0, max=LARGEST_WHOLE, metavar="STEPS", help="Steps of training.", show_default="600 where it needs any"
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE|TASK[:KEY=VALUE,...]",
            help="Text or a task to learn, choose and measure on; may be given many times.",
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            metavar="KEY=VALUE,...",
            help="What is learned, not the method's own: attention=1, matrix=1, or weights of hidden, logits, task.",
        ),
    ] = None,
    sets: SetOption = None,
    prompts: Annotated[int, typer.Option(min=1, max=LARGEST_WHOLE, help="Of each task, to compare on.")] = 64,
    lengths: Annotated[
        str, typer.Option(help="Tokens at which bytes of state are told; k stands for 1024.")
    ] = "1k,16k",
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_WHOLE, help="Of prompts and of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    time: TimeOption = TIMED,
    transformers: TransformersOption = None,
    plugin: PluginOption = None,
) -> None:
    """Make attention layers of a trained model another mixer, let it learn from the old one, and say what it cost.

    Interrupted, the same command goes on where it was. --set changes keys of the training, such as batch=32.

    Examples:

      contextlab convert runs/mine --to gated_delta_net --layers half --data notes.txt --out cheaper

      contextlab convert runs/mine --to gqa:kv_heads=1 --out grouped

      contextlab convert runs/mine --to kda --layers auto:2 --data associative_recall --stage attention=1 --out kda
    """
    load_components(plugin, (*PARTS, "conversion"))
    from contextlab.convert.conversion import convert as run
    from contextlab.convert.conversion import read_request, steps_of
    from contextlab.convert.methods import check_data
    from contextlab.experiments import find_own_model
    from contextlab.places import require_free
    from contextlab.training.distributed import resolve

    require_free(out)
    aside = _stages_folder(out)
    target, layers = _target(to, layers)
    learned, settings, sizes = _stages(stage), _settings(sets), read_lengths(lengths)
    steps_of(read_request(target, layers)[0], budget, bool(data), bool(learned or settings))
    check_data(data)
    loaded = find_own_model(model, resolve(device))
    require_time(loaded, time)
    with going_on(lambda: _kept(aside)):
        found = run(
            loaded, target, data, layers=layers, budget=budget, stages=learned, train=settings, prompts=prompts,
            lengths=sizes, seed=seed, folder=aside, transformers=bool(transformers), progress=None,
        )  # fmt: skip
    show(found)
    finish(found, out, loaded, model, time, transformers, aside, source=model, seed=seed)


def _kept(aside: Path) -> str:
    from contextlab.files import short

    return f"the same command goes on where it was, by {short(aside)}" if aside.exists() else "nothing is kept"


def _stages_folder(out: Path) -> Path:
    """Where the stages keep checkpoints. It is removed at the end, so that nothing else may be there."""
    from contextlab.files import present, short
    from contextlab.training.checkpoint import holds_checkpoints_alone

    aside = out.with_name(f"{out.name}.stages")
    if present(aside) and not holds_checkpoints_alone(aside):
        raise InputError(
            f"{short(aside)}: is there already, and holds other things than the checkpoints of an interrupted "
            "conversion, which belong there; rename it or choose another --out"
        )
    return aside


def _target(to: str, layers: str | None) -> tuple[str | Conversion, str | None]:
    """The conversion or mixer as it is written, or what makes the layers of a recipe's or a run's model; and layers."""
    from contextlab import registry
    from contextlab.convert.like import LikeModel
    from contextlab.experiments.models import find_spec, is_recipe
    from contextlab.files import present

    name = to.partition(":")[0]
    known = name in registry.names("conversion") or name in registry.names("mixer")
    if known or not (is_recipe(to) or present(Path(to)) or present(Path(name))):
        return to, layers
    spec = find_spec(to)
    if layers is not None and layers.startswith(("auto", "gates")):
        return LikeModel(target=spec), layers
    return LikeModel(target=spec, layers=layers or "all"), None


def _settings(sets: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE of the training."""
    from contextlab.policies.core.parse import parse_options
    from contextlab.training.spec import TrainSpec

    if any(not each.strip() for each in sets or ()):
        raise InputError("--set: expected KEY=VALUE, such as batch=32, got ''")
    found = parse_options(f"train:{','.join(sets)}", "--set")[1] if sets else {}
    if stray := [key for key in found if key not in TrainSpec.model_fields]:
        raise InputError(f"--set: {unknown('key', stray[0], TrainSpec.model_fields, 'train')}")
    return found


def _stages(texts: list[str] | None) -> list[Stage] | None:
    """`attention=1`, `logits=1,task=0.5,share=3,learning_rate=0.001`, `task=1,trains=lora,rank=8` -> stages."""
    from contextlab.convert.teacher import Distil
    from contextlab.convert.transfer import ADAPTERS, Stage
    from contextlab.policies.core.parse import parse_options
    from contextlab.training.spec import LoraSpec

    if not texts:
        return None
    found = []
    for text in texts:
        if not text.strip():
            raise InputError("--stage: expected KEY=VALUE,..., such as logits=1, got ''")
        options = parse_options(f"stage:{text}", "--stage")[1]
        known = (*Distil.model_fields, "share", "learning_rate", "trains", "rank", "targets")
        if stray := [key for key in options if key not in known]:
            raise InputError(f"--stage: {unknown('key', stray[0], known)}")
        own: dict[str, Any] = {key: options.pop(key) for key in ("share", "learning_rate", "trains") if key in options}
        lora = {key: options.pop(key) for key in ("rank", "targets") if key in options}
        distil = Distil.parse(options, "--stage")
        if not all(type(own.get(key, 1)) in (int, float) and own.get(key, 1) > 0 for key in ("share", "learning_rate")):
            raise InputError(f"--stage {text[:60]}: share and learning_rate are numbers above 0")
        if own.setdefault("trains", "new" if distil.by_layer else "all") not in ("new", "all", "lora"):
            raise InputError(f"--stage {text[:60]}: trains is new (the mixers that were replaced), all or lora")
        if lora:
            if own["trains"] != "lora":
                raise InputError(f"--stage {text[:60]}: {next(iter(lora))} is of adapters; add trains=lora")
            if "targets" in lora:
                names = lora["targets"] if isinstance(lora["targets"], list) else [lora["targets"]]
                lora["targets"] = [each if "." in str(each) else f"blocks.*.mixer.{each}" for each in names]
            own["lora"] = LoraSpec.parse({"targets": ADAPTERS.targets, **lora}, "--stage")
        name = next(key for key in ("attention", "matrix", "hidden", "logits", "task") if getattr(distil, key))
        found.append(Stage(name, distil, **own))
    return found


def show(found: Transferred) -> None:
    """What was done, how it learned, how it compares, and what it weighs: a table each."""
    print_table(title_of(found.method, found.options), _changes(found), prose=["what was done"])
    if found.choices:
        rows = [{"layer": str(each.layer), **_cost(each), "": "changed" * each.chosen} for each in found.choices]
        print_table("layers, and what each costs", rows)
    if found.stages:
        rows = [
            {
                "stage": each.name, "steps": str(each.steps), "tokens": f"{each.tokens:,}",
                "loss": f"{each.first:.4g} to {each.last:.4g}", "seconds": f"{each.seconds:.3g}",
            }
            for each in found.stages
        ]  # fmt: skip
        print_table("training", rows)
    show_compared(found.compared)
    show_bytes({"weights": found.weights, **{f"state at {n:,} tokens": pair for n, pair in found.state.items()}})
    console.print(f"[dim]{counted(len(found.layers), 'layer')} changed, in {found.seconds:.3g} s.[/dim]\n")


def _cost(each: Choice) -> dict[str, str]:
    if each.gate is not None:
        return {"gate to the new mixer": f"{each.gate:.3f}"}
    return {"divergence alone": f"{each.divergence:.4g}"}


def _changes(found: Transferred) -> list[dict[str, str]]:
    """Like changes in one row; convert.json has each."""
    alike: dict[str, list[Any]] = {}
    for line in found.lines:
        alike.setdefault(line.did, []).append(line)
    rows = []
    for did, lines in alike.items():
        errors = sorted(line.error for line in lines)
        shown = list(dict.fromkeys(f"{error:.3g}" for error in (errors[0], errors[-1])))
        layers = ", ".join(line.layer.split(".")[1] for line in lines)
        rows.append({"layers": layers, "what was done": escape(did), "error": " to ".join(shown), "of": lines[0].of})
    return rows
