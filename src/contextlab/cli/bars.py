"""Progress of an experiment: a live bar for each training, or lines where the output is no terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from contextlab.cli.shared import console


class Bars:
    """A live bar for each training; one line an event when the output is no terminal."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.quiet = quiet
        self.bars: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> Bars:
        if not self.quiet:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self.quiet:
            self.progress.stop()

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        if not self.quiet:
            self.progress.update(self._bar(key), completed=step, total=steps, loss=f"loss {loss:.4g}")

    def phase(self, key: str, text: str) -> None:
        if self.quiet:
            print(f"{key}: {text}", flush=True)
        elif not key.startswith("learners."):
            self.progress.update(self._bar(key), description=f"{_short(key)} [dim]{text}[/]")

    def done(self, key: str, status: str, message: str) -> None:
        text = f"{status}: {message}" if message else status
        if self.quiet:
            print(f"{key}: {text}", flush=True)
        elif not key.startswith("learners.") or status != "finished":
            colour = "green" if status == "finished" else "red"
            self.progress.update(self._bar(key), description=f"{_short(key)} [{colour}]{escape(text[:60])}[/]")

    def _bar(self, key: str) -> TaskID:
        if key not in self.bars:
            self.bars[key] = self.progress.add_task(_short(key), total=None, loss="")
        return self.bars[key]


def _short(key: str) -> str:
    """regression.transformer.seed0 -> regression / transformer / 0, without the seed when it is 0."""
    parts = key.split(".")
    seed = parts[-1].removeprefix("seed")
    return escape(" / ".join(parts[:-1] + ([f"seed {seed}"] if seed not in ("0", parts[-1]) else [])))
