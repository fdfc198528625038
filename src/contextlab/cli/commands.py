"""The commands, in the order in which --help shows them."""

from __future__ import annotations

import inspect

from rich.markup import escape

from contextlab.cli import stages as stages  # of `run`, which asks for it when there are any
from contextlab.cli.about import doctor, schema
from contextlab.cli.advise import advise
from contextlab.cli.catalogue import list_
from contextlab.cli.check import check
from contextlab.cli.claims import CLAIMS
from contextlab.cli.compress import compress
from contextlab.cli.convert import convert
from contextlab.cli.cost import cost
from contextlab.cli.generate import generate
from contextlab.cli.inspect import inspect_
from contextlab.cli.learners import learners, similarity
from contextlab.cli.merge import merge
from contextlab.cli.papers import PAPERS
from contextlab.cli.report import report
from contextlab.cli.run import evaluate, run
from contextlab.cli.shared import app
from contextlab.cli.show import show
from contextlab.cli.shrink import shrink
from contextlab.cli.sweep import sweep

for command in (
    run, sweep, list_, show, learners, similarity, evaluate, report, cost, compress, advise, convert, shrink, merge,
    generate, inspect_, check, doctor, schema,
):  # fmt: skip
    # Escaped: in a docstring [train] is a value, where rich sees a style and leaves it out.
    app.command(command.__name__.rstrip("_"), help=escape(inspect.getdoc(command) or ""))(command)
app.add_typer(CLAIMS, name="claims")
app.add_typer(PAPERS, name="papers")
