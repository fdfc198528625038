"""The command line: parses, calls, prints; a file for each group of commands.

Heavy imports (torch, pandas) wait inside the commands until they are needed, so that `--help` is quick.
"""

from contextlab.cli.commands import app
from contextlab.cli.entry import main

__all__ = ["app", "main"]
