"""The entry point: runs a command, turns errors into one line and an exit code."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import re
import signal
import sys
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from contextlab.cli.arguments import largest_given
from contextlab.cli.commands import app
from contextlab.errors import ContextlabError
from contextlab.memory import limited_memory, plain_memory_errors
from contextlab.threads import yield_cores

ClickException: Any = typer.BadParameter.__mro__[2]  # click's own, or that of the copy inside newer versions of typer


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a part failed, 2 wrong input, 130 interrupted, 141 not read on."""
    yield_cores()
    atexit.register(gc.freeze)  # else the collector walks all of torch once more, 0.4 s, before the process ends
    signal.signal(signal.SIGTERM, _stop)
    try:
        with plain_memory_errors(largest_given(sys.argv[1:])), limited_memory():
            code = app(standalone_mode=False)
    except ClickException as error:
        if "\n" in error.format_message():  # a command without any argument: its help
            error.show()
        else:
            _tell(_plainly(error))
        sys.exit(error.exit_code)
    except ContextlabError as error:
        _tell(str(error))
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as stop:  # commands end by typer.Exit: this is typer's or rich's, where a pipe's reader has gone
        sys.exit(_unread() if isinstance(stop.__context__, BrokenPipeError) else stop.code)
    except BrokenPipeError:
        sys.exit(_unread())
    except OSError as error:  # of a path that the user gave and no function has checked, such as one of too long a name
        from contextlab.files import short

        where = f"{short(error.filename)}: " if error.filename is not None else ""
        _tell(f"{where}{error.strerror or error}")
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _tell(message: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)


def _plainly(error: Any) -> str:
    """What is wrong with the words of a command line, in the form of all other messages, and where to read more."""
    told = re.sub(r"^Invalid value for '(.*?)'( / '.*?')*: ", r"\1: ", error.format_message()).rstrip(".")
    told = re.sub(r"(\S+) is not in the range ([\d.-]+)<=x<=([\d.]+)$", r"expected \2 to \3, got \1", told)
    told = re.sub(r"(\S+) is not in the range x>=([\d.-]+)$", r"expected at least \2, got \1", told)
    told = f"{told[:1].lower()}{told[1:]}".replace(": Input should", ": input should")
    words = str(getattr(getattr(error, "ctx", None), "command_path", "")).split()[1:]  # after the program's name
    return f"{told} ({' '.join(('contextlab', *words))} --help tells the options)"


def _stop(number: int, frame: object) -> None:
    """End in order, as Ctrl-C does; also where SIGINT is ignored, as in a shell's background jobs."""
    raise KeyboardInterrupt


def _unread() -> int:
    """The exit code where the reader of a pipe has gone, as in `contextlab list task | head -1`: that of SIGPIPE."""
    with contextlib.suppress(OSError, ValueError):  # else Python writes what is left as it ends, and complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13
