"""What all commands share: the app, the console, common options, and how components become known."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from contextlab import __version__

app = typer.Typer(
    name="contextlab",
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
    typer.Option("--plugin", help="Import this module or .py file first, so that its components are known."),
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


def load_components(plugins: list[str] | None) -> None:
    import contextlab.learners
    import contextlab.mixers
    import contextlab.models
    import contextlab.policies
    import contextlab.tasks  # noqa: F401
    from contextlab.plugins import load_plugins

    load_plugins(plugins or [])
