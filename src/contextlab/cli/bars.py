"""Progress of an experiment: a live bar for each training, or lines where the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from contextlab.cli.shared import console
from contextlab.progress import rich_bars

if TYPE_CHECKING:
    from contextlab.experiments.jobs import Job


class Bars:
    """A live bar for each training; one line an event when the output is no terminal."""

    def __init__(self, jobs: Iterable[Job], quiet: bool) -> None:
        self.quiet = quiet
        self.jobs = {job.key: job for job in jobs}
        self.bars: dict[str, Any] = {}
        self.progress = rich_bars(console)

    def __enter__(self) -> Bars:
        if not self.quiet:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self.quiet:
            self.progress.stop()

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        if not self.quiet:
            self.progress.update(self._bar(key), completed=step, total=steps, told=f"loss {loss:.4g}")

    def phase(self, key: str, text: str) -> None:
        if self.quiet:
            print(f"{key}: {text}", flush=True)
        elif self.jobs[key].kind != "learners":
            self.progress.update(self._bar(key), description=f"{self._title(key)} [dim]{text}[/]")

    def done(self, key: str, status: str, message: str) -> None:
        text = f"{status}: {message}" if message else status
        if self.quiet:
            print(f"{key}: {text}", flush=True)
        elif self.jobs[key].kind == "trial" and status in ("finished", "paused"):
            self.progress.remove_task(self._bar(key))  # there may be hundreds
            del self.bars[key]
        elif self.jobs[key].kind != "learners" or status != "finished":
            colour = "green" if status == "finished" else "red"
            self.progress.update(self._bar(key), description=f"{self._title(key)} [{colour}]{escape(text[:60])}[/]")

    def _bar(self, key: str) -> Any:
        if key not in self.bars:
            self.bars[key] = self.progress.add_task(self._title(key), total=None, told="")
        return self.bars[key]

    def _title(self, key: str) -> str:
        return escape(self.jobs[key].title)
