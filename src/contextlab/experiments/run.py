"""Run an experiment: train every model on every task (or group of tasks) from every seed, evaluate, report.

A walk through a run: `check` tries what the spec names, `folder` finds and claims a place, `record` begins or goes on,
`jobs` lists what is to be done, `work` does one job (`workers` several at once), and `closing` puts all together.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from contextlab.errors import InputError
from contextlab.experiments.as_begun import require_as_begun
from contextlab.experiments.check import check
from contextlab.experiments.closing import close
from contextlab.experiments.folder import OF_RUN, SPEC, RunFolder, claimed, exclusive, find_folder, read_run_record
from contextlab.experiments.jobs import (
    Job,
    chosen_jobs,
    compress_jobs,
    first_jobs,
    inspect_jobs,
    measuring_jobs,
    trained_for,
)
from contextlab.experiments.on_ray import RayTeam, ray_address
from contextlab.experiments.opened import Run, open_run
from contextlab.experiments.progress import Progress, Silent, told
from contextlab.experiments.recipes import load_recipe, read_yaml
from contextlab.experiments.record import (
    begin,
    change_evaluation,
    differs_in_evaluation_only,
    go_on,
    plugin_names,
    require_plugins,
    write_status,
)
from contextlab.experiments.rungs import most_rungs
from contextlab.experiments.sampling import Asking, require_sampler, rounds, settle
from contextlab.experiments.spec import ExperimentSpec
from contextlab.experiments.stages import Stages, claim, load_stages
from contextlab.experiments.together import train_groups, wanted
from contextlab.experiments.trackers import Tracked, require_trackers
from contextlab.experiments.trial import (
    decided_otherwise,
    replaced,
    rung_jobs,
    stale,
    stale_compressed,
    stale_inspected,
    tell_standings,
)
from contextlab.experiments.work import do_job, trained
from contextlab.experiments.workers import Workers
from contextlab.plugins import load_plugins, plugin_options
from contextlab.progress import Steps
from contextlab.threads import torch_threads
from contextlab.training.distributed import resolve

__all__ = ["Interrupted", "Progress", "Run", "Silent", "evaluate_run", "open_run", "run"]


class Interrupted(KeyboardInterrupt):
    """A run was stopped in order. Its message says how to go on; `folder` is the run's."""

    def __init__(
        self, folder: RunFolder, plugins: Sequence[str], trackers: Sequence[str] = (), address: str | None = None
    ) -> None:
        self.folder = folder.path
        options = plugin_options(plugins) + "".join(f" --log {each}" for each in trackers)
        if address is not None:
            options += f" --on ray{address and ':'}{address}"
        super().__init__(f"interrupted; go on with: contextlab run {folder} --resume{options}")


def run(
    experiment: ExperimentSpec | dict[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    resume: bool = False,
    jobs: int | None = 1,
    threads: int | None = None,
    plugins: Sequence[str] = (),
    progress: Progress | Steps | bool | None = None,
    log: Sequence[str] = (),
    on: str | None = None,
    ensemble: str = "auto",
) -> Run:
    """Train, evaluate and report an experiment.

    experiment: an ExperimentSpec, a mapping of its keys, a recipe's path or the name of one. Of a recipe in stages
        (`experiments.stages`) all are run, in folders of their names; the last one's Run is returned.
    out: the run's folder; None takes runs/<name>, or runs/<name>-2 and so on when that is taken.
    device: "auto", "cpu" or "cuda".
    resume: go on with the unfinished run in the folder, or make again what a finished one lacks; what is measured
        (`evaluate`) may differ from before, and is then measured again. On CPU the results are those of a run never
        stopped.
    jobs: trainings at once, each in a process of its own with its share of the cores; None takes as many as cores
        on CPU and one on CUDA. Worker processes know contextlab and the plugins only; 1 works in this process.
    threads: of each training; equal threads give equal bits, whatever `jobs`. None takes a share of the cores, and of a
        resumed run what it was begun with.
    plugins: modules (or .py files) that register components of your own.
    progress: told what happens: a `Progress`, or a function of (step, steps, loss) as `train` takes. True shows bars,
        False none, and None where a person watches: in an interactive terminal or a notebook.
    log: trackers that are told too: "tensorboard", "wandb", "trackio", "mlflow"; see `experiments.trackers`.
    on: "ray" or "ray:ADDRESS" does the jobs on a Ray cluster, as many at once as have room, whatever `jobs`; the run's
        folder must be on storage that all nodes see.
    ensemble: "auto" trains seeds and trials of a small model on one task as one program on CUDA, where it can
        (`training.train_together`), and never on CPU, where it is slower, nor on Ray; "off" trains each alone.

    Raises InputError when the spec is wrong or the folder is taken; Interrupted (a KeyboardInterrupt) leaves a run to
    resume.
    """
    if not isinstance(experiment, ExperimentSpec) and (parts := load_stages(experiment)) is not None:
        load_plugins(plugins)
        return _run_stages(
            parts, out, resume, device=device, jobs=jobs, threads=threads, plugins=plugins, progress=progress, log=log,
            on=on, ensemble=ensemble,
        )  # fmt: skip
    if resume and out is not None:
        require_plugins(RunFolder(out), plugins)
    load_plugins(plugins)
    require_trackers(log)
    address = ray_address(on)
    spec = as_spec(experiment)
    if rounds(spec):
        spec = spec.model_copy()  # what is asked for is of this run
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    chosen = resolve(device)
    together = wanted(ensemble, chosen) and address is None
    next(find_folder(spec, out, resume))  # where there is none, nothing needs to be tried
    require_sampler(spec)
    check(spec, chosen)
    with claimed(spec, out, resume) as folder:
        record = (go_on if resume else begin)(folder, spec, chosen, jobs, threads, plugins)
        settle(folder, spec)
        if resume:
            require_as_begun(folder, spec)
            if record["status"] == "finished":
                tell_standings(folder, spec)  # who is in may have changed with the recipe
        if record["status"] == "finished" and folder.whole(spec) and not decided_otherwise(folder, spec):
            return open_run(folder.path)
        asking = Asking(folder, spec)
        stages: list[Callable[[], list[Job]]] = [
            lambda: [job for job in first_jobs(spec) if not folder.done(job, spec)],
            *(partial(_asked, folder, spec, asking, number) for number in range(rounds(spec))),
        ]
        with told(progress) as watcher, Tracked(watcher, log, folder, spec, record) as tell:
            return _do(
                folder, spec, record, itertools.chain(stages, _last_stages(folder, spec)), tell, trackers=log,
                address=address, together=together,
            )  # fmt: skip


def _run_stages(stages: Stages, out: str | Path | None, resume: bool, **options: Any) -> Run:
    """All stages, one after another, each tried before the first one is begun. Returns the last stage's run.

    options: those of `run`.
    """
    chosen = resolve(options["device"])
    stages.each(lambda _, spec: check(spec, chosen))
    folder = claim(stages, out, resume)
    done: Run | None = None
    try:
        for stage in stages.turns(folder):
            done = run(stage.spec, out=stage.folder, resume=stage.begun, **options)
            if done.record["status"] != "finished":
                break  # what comes after would start from what is not there
    except Interrupted:
        raise Interrupted(RunFolder(folder), options["plugins"], options["log"], ray_address(options["on"])) from None
    assert done is not None
    return done


def evaluate_run(
    folder: str | Path,
    changes: Sequence[str] = (),
    *,
    jobs: int | None = 1,
    plugins: Sequence[str] = (),
    progress: Progress | Steps | bool | None = None,
) -> Run:
    """Measure the trained models of a run again, with another evaluation, and report; nothing is trained.

    folder: of the run, in which results and report are replaced.
    changes: `key=value` of keys under `evaluate` or `tasks.NAME.evaluate`, such as "evaluate.prompts=4096"; what is
        not measured in that way yet is measured. None measures all as before.
    Other arguments are those of `run`.

    Raises InputError when there is no run, none of its trainings has finished, or another key is changed.
    """
    at = RunFolder(folder)
    if not at.record.exists() or not at.spec.exists():
        raise InputError(f"{folder}: no run there (expected {at.record.name} and {SPEC})")
    require_plugins(at, plugins)
    load_plugins(plugins)
    before = ExperimentSpec.parse(read_yaml(at.spec), str(at.spec))
    spec = load_recipe(at.spec, changes)
    if not differs_in_evaluation_only(before, spec):
        raise InputError(
            "--set: only the evaluation of a trained run can be changed; expected evaluate.KEY=VALUE or "
            "tasks.NAME.evaluate.KEY=VALUE"
        )
    with exclusive(at):
        settle(at, spec)
        require_as_begun(at, spec)
        record = read_run_record(at.record, OF_RUN)
        device = resolve(record["device"])
        todo = [job for job in measuring_jobs(spec) if job.kind == "learners" or trained(at, job)]
        if all(job.kind == "learners" for job in todo):
            raise InputError(
                f"{folder}: no training of this run has finished; go on with: contextlab run {folder} --resume"
            )
        check(spec, device)
        if changes:
            change_evaluation(at, before, spec)
            todo = [job for job in todo if not at.done(job, spec)]
        for job in (*compress_jobs(spec), *inspect_jobs(spec)):
            at.done(job, spec)  # they are kept: one that is damaged is told of before anything is measured
        record |= {"jobs": min(jobs or record["jobs"], max(1, len(todo))), "plugins": plugin_names(plugins)}
        with told(progress) as tell:
            return _do(at, spec, record, [lambda: todo], tell, training=False)


def _asked(folder: RunFolder, spec: ExperimentSpec, asking: Asking, number: int) -> list[Job]:
    return [job for job in asking.ask(number) if not folder.done(job, spec)]


def _not_measured(folder: RunFolder, spec: ExperimentSpec) -> list[Job]:
    other = stale(folder, spec)
    return [job for job in chosen_jobs(spec) if job in other or not folder.done(job, spec)]


def _last_stages(folder: RunFolder, spec: ExperimentSpec) -> Iterator[Callable[[], list[Job]]]:
    """What is done with the trials: the better go on, the best are measured; then policies and probes, on the best."""
    done: set[Job] = set()
    yield from _rungs(folder, spec, done)
    yield partial(_not_measured, folder, spec)
    while replaced(folder, spec):
        yield from _rungs(folder, spec, done)
        yield partial(_not_measured, folder, spec)
    yield partial(_not_compressed, folder, spec)
    yield partial(_not_inspected, folder, spec)


def _rungs(folder: RunFolder, spec: ExperimentSpec, done: set[Job]) -> Iterator[Callable[[], list[Job]]]:
    """The trials that go on, rung by rung; where all that went on from one diverged, first those that take their place.

    done: jobs that were done in this call, which are not done twice: one that failed is tried again by `--resume`.
    """

    def first(last: int) -> list[Job]:
        """What is to be done at the first rung, up to this one, at which anything is."""
        for rung in range(1, last + 1):
            if todo := [job for job in rung_jobs(folder, spec, rung) if job not in done]:
                return todo
        return []

    for last in range(1, most_rungs(spec) + 1):
        while todo := first(last):
            done.update(todo)
            yield partial(list, todo)


def _not_compressed(folder: RunFolder, spec: ExperimentSpec) -> list[Job]:
    other = stale_compressed(folder, spec)
    return [job for job in compress_jobs(spec) if job in other or not folder.done(job, spec)]


def _not_inspected(folder: RunFolder, spec: ExperimentSpec) -> list[Job]:
    other = stale_inspected(folder, spec)
    jobs = (job for job in inspect_jobs(spec) if job in other or not folder.done(job, spec))
    return [job for job in jobs if trained(folder, trained_for(spec, job))]


def as_spec(experiment: ExperimentSpec | dict[str, Any] | str | Path) -> ExperimentSpec:
    """The spec that is meant: itself, of a mapping, or of a recipe by path or name."""
    if isinstance(experiment, ExperimentSpec):
        return experiment
    if isinstance(experiment, str | Path):
        return load_recipe(experiment)
    return ExperimentSpec.parse(experiment)


def _do(
    folder: RunFolder,
    spec: ExperimentSpec,
    record: dict[str, Any],
    stages: Iterable[Callable[[], list[Job]]],
    tell: Progress,
    training: bool = True,
    trackers: Sequence[str] = (),
    address: str | None = None,
    together: bool = False,
) -> Run:
    """Do the jobs of one stage after another, then close the run."""
    try:
        write_status(folder, record, "running")
        with _team(folder, spec, record, tell, training, address) as do:
            for stage in stages:
                todo = stage()
                if together:
                    train_groups(folder, spec, todo, torch.device(record["device"]), tell)
                do(todo)
        return close(folder, spec, record)
    except KeyboardInterrupt:
        write_status(folder, record, "interrupted")
        raise Interrupted(folder, record["plugins"], trackers, address) from None


@contextlib.contextmanager
def _team(
    folder: RunFolder,
    spec: ExperimentSpec,
    record: dict[str, Any],
    tell: Progress,
    training: bool,
    address: str | None,
) -> Iterator[Callable[[list[Job]], None]]:
    """What does a list of jobs: a Ray cluster, as many workers as the record says, or this process."""
    if address is not None:
        with RayTeam(folder, spec, record, tell, training, address) as cluster:
            yield cluster.do
        return
    if record["jobs"] > 1:
        with Workers(folder, spec, record, tell, training) as workers:
            yield workers.do
        return

    def do(todo: list[Job]) -> None:
        for job in todo:
            do_job(folder, spec, job, torch.device(record["device"]), tell, training)

    with torch_threads(record["threads"]):
        yield do
