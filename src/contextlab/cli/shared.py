"""What all commands share: the app, the console, common options, and how components become known."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from contextlab import __version__
from contextlab.kinds import room


@contextmanager
def going_on(how: Callable[[], str] | None = None) -> Iterator[None]:
    """Say how to go on where a command is interrupted: typer itself would end without a word.

    how: asked then; None says what the interruption itself says.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        said = str(stop) if how is None else f"interrupted; {how()}"
        print(said or "interrupted; nothing is kept", file=sys.stderr, flush=True)
        raise typer.Exit(130) from None


class _Commands(TyperGroup):
    """The commands, none of which ends without a word where it is interrupted."""

    def invoke(self, ctx: Any) -> Any:
        """See click's `Group.invoke`."""
        with going_on():
            return super().invoke(ctx)


app = typer.Typer(
    name="contextlab",
    cls=_Commands,
    help="What can a sequence model learn from its context, what does that context cost, "
    "and what is lost when it is made cheaper?",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="Import this module or .py file first, so that its components are known; may be given many times.",
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key; may be given many times.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"contextlab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


PARTS: tuple[str, ...] = ("mixer", "mlp", "model", "task", "learner", "policy", "linear")
"""What experiments are made of: all kinds but conversions and the report's figures, which wait for
pandas and Plotly."""


def load_components(plugins: list[str] | None, kinds: Iterable[str] = PARTS) -> None:
    """Import what registers the components of these kinds, then the plugins."""
    with _no_collection():
        for kind in kinds:
            import_module(room(kind))
    from contextlab.plugins import load_plugins

    load_plugins(plugins or [])


@contextmanager
def _no_collection() -> Iterator[None]:
    """Imports of torch make some 500,000 objects that stay: the collector would walk them in vain, a tenth of a second.

    Frozen, they are left alone when the interpreter ends, too, which spares four tenths
    (`python -c "import gc; gc.disable(); import torch; gc.freeze()"` beside `python -c "import torch"`).
    """
    first, enabled = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
        if enabled:
            gc.enable()
