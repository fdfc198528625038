"""Progress of long work where a person watches: bars in a terminal, and in a notebook without any widget.

`train` and `run` take `progress`: None shows bars in an interactive terminal or a notebook and nothing elsewhere, True
always, False never; a function of (step, steps, loss) is called instead.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Steps = Callable[[int, int, float], None]


class Bars:
    """A bar for each piece of work, known by its key; as `experiments.Progress` and as a context manager."""

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        """A training has made `step` of `steps` steps."""
        self.draw(key, step, steps, f"loss {loss:.4g}")

    def phase(self, key: str, text: str) -> None:
        """A job has entered a phase."""
        self.draw(key, None, None, text)

    def done(self, key: str, status: str, message: str) -> None:
        """A job has ended."""
        self.draw(key, None, None, f"{status}: {message}" if message else status)

    def draw(self, key: str, step: int | None, steps: int | None, told: str) -> None:
        """Show how far a piece of work is; None leaves that as it was."""
        raise NotImplementedError

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None: ...


def rich_bars(console: Any) -> Any:
    """rich's Progress on a console, with what each task's field `told` says beside its bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    told = TextColumn("{task.fields[told]}", markup=False)
    return Progress(*columns, told, TimeRemainingColumn(), console=console)


class TerminalBars(Bars):
    """Bars on standard error, so that what a program prints stays its own."""

    def __init__(self) -> None:
        from rich.console import Console

        self.progress = rich_bars(Console(stderr=True))
        self.tasks: dict[str, Any] = {}

    def draw(self, key: str, step: int | None, steps: int | None, told: str) -> None:
        if key not in self.tasks:
            self.tasks[key] = self.progress.add_task(key.replace("[", "\\["), total=None, told="")
        self.progress.update(self.tasks[key], completed=step, total=steps, told=told)

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


class NotebookBars(Bars):
    """HTML's own progress elements, in one output that is drawn anew; a front end needs no widgets for them."""

    def __init__(self) -> None:
        self.lines: dict[str, tuple[int, int, str]] = {}
        self.shown: Any = None

    def draw(self, key: str, step: int | None, steps: int | None, told: str) -> None:
        before = self.lines.get(key, (0, 0, ""))
        self.lines[key] = (before[0] if step is None else step, before[1] if steps is None else steps, told)
        display = sys.modules["IPython"].display
        page = display.HTML("<div>" + "".join(map(self._line, self.lines)) + "</div>")
        if self.shown is None:
            self.shown = display.display(page, display_id=True)
        else:
            self.shown.update(page)

    def _line(self, key: str) -> str:
        step, steps, told = self.lines[key]
        bar = f'<progress value="{step}" max="{steps}"></progress> {step:,} of {steps:,} ' if steps else ""
        return f"<div>{html.escape(key)} {bar}{html.escape(told)}</div>"


def in_notebook() -> bool:
    """Whether IPython runs this code as the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def bars(wanted: bool | None) -> Bars | None:
    """Bars where they are wanted, or where None leaves that to whether a person watches."""
    if wanted is False:
        return None
    if in_notebook():
        return NotebookBars()
    return TerminalBars() if wanted or sys.stderr.isatty() else None


@contextmanager
def shown(progress: Steps | bool | None, key: str = "training") -> Iterator[Steps | None]:
    """What one training tells its steps to; None for nothing. progress: see this module."""
    made = bars(progress) if progress is None or isinstance(progress, bool) else None
    if made is None:
        yield None if isinstance(progress, bool) else progress
        return
    with made:
        yield lambda step, steps, loss: made.update(key, step, steps, loss)
