"""The commands, in the order in which --help shows them."""

from __future__ import annotations

from contextlab.cli.about import doctor, schema
from contextlab.cli.catalogue import list_
from contextlab.cli.check import check
from contextlab.cli.compress import compress
from contextlab.cli.cost import cost
from contextlab.cli.learners import learners, similarity
from contextlab.cli.report import report
from contextlab.cli.run import evaluate, run
from contextlab.cli.shared import app
from contextlab.cli.show import show
from contextlab.cli.sweep import sweep

app.command()(run)
app.command()(sweep)
app.command("list")(list_)
for command in (show, learners, similarity, evaluate, report, cost, compress, check, doctor, schema):
    app.command()(command)
