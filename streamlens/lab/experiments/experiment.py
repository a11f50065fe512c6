"""`Experiment`: runs over conditions and seeds, in parallel and resumable, and what they come to."""

from __future__ import annotations

import inspect
import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from streamlens.lab.experiments.findings import Findings, check_export
from streamlens.lab.experiments.results import Results
from streamlens.lab.experiments.scale import Scale, parse
from streamlens.lab.experiments.trial import ExperimentError, Settings, Trial, is_complete, store_of
from streamlens.lab.seeding import seed_everything

__all__ = ["Experiment"]


@dataclass(frozen=True)
class Experiment:
    """What a script studies.

    Attributes:
        name: A name for folders and titles.
        conditions: The settings of each condition, for a scale; no two alike.
        train: Trains and records one run. It is called in another process, after seeding.
        analyse: What follows from all runs.
    """

    name: str
    conditions: Callable[[Scale], Sequence[Settings]]
    train: Callable[[Trial], None]
    analyse: Callable[[Results], Findings]

    def main(self, argv: Sequence[str] | None = None) -> Findings:
        """Run it as the command line says, leave what was found, and print the answers.

        Args:
            argv: The arguments; those of the process unless given.

        Raises:
            SystemExit: The command line cannot be read.
            ExperimentError: Some runs failed. The others are kept; started again, those that failed run.
        """
        doc = inspect.getdoc(inspect.getmodule(self.train)) or self.name
        scale = parse(self.name, doc.splitlines()[0], argv)
        check_export()
        results = self.run(scale)
        findings = self.analyse(results)
        findings.write(scale.out / self.name, self.name)
        results.write_csv(scale.out / self.name)
        for answer in findings.answers:
            print(f"- {answer}")  # noqa: T201 - what a script prints
        return findings

    def trials(self, scale: Scale) -> Iterator[Trial]:
        """All runs: each condition with each seed, seed by seed."""
        conditions = [dict(condition) for condition in self.conditions(scale)]
        for seed, condition in itertools.product(range(scale.seeds), conditions):
            settings = {**condition, "dataset": scale.dataset, "seed": seed}
            store = store_of(scale.out / self.name / "runs", settings)
            yield Trial(self.name, settings, store, scale.data_dir, scale.device)

    def run(self, scale: Scale) -> Results:
        """Make all runs that are not there yet.

        Raises:
            ExperimentError: Some failed.
            ValueError: Two conditions are alike.
        """
        trials = list(self.trials(scale))
        if len({trial.store for trial in trials}) < len(trials):
            raise ValueError(f"{self.name}: two conditions are alike, so that one run would be taken for two")
        wanted = [t for t in trials if scale.fresh or not is_complete(t.store, t.settings)]
        console = Console(stderr=True, highlight=False)
        console.print(f"{self.name}: {len(trials)} runs, {len(trials) - len(wanted)} of them done already")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        failed: list[str] = []
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(self.name, total=len(wanted))
            jobs = joblib.Parallel(
                n_jobs=min(scale.jobs, max(len(wanted), 1)), return_as="generator_unordered"
            )
            for failure in jobs(joblib.delayed(_run)(self.train, trial) for trial in wanted):
                progress.advance(task)
                if failure is not None:
                    failed.append(failure)
                    console.print(failure, style="red", markup=False)
        if failed:
            raise ExperimentError(
                f"{self.name}: {len(failed)} of {len(wanted)} runs failed, the first with: {failed[0]}"
            )
        return Results([(trial.settings, trial.store) for trial in trials])


def _run(train: Callable[[Trial], None], trial: Trial) -> str | None:
    """Make one run; what went wrong, if anything did."""
    torch.set_num_threads(1)
    seed_everything(int(trial["seed"]))
    # It gets its name when it is complete, so that whoever was cut short is not taken for a run.
    under_way = trial.store.with_suffix(".part")
    try:
        _remove(under_way)
        train(replace(trial, store=under_way))
        if not is_complete(under_way, trial.settings):
            raise ExperimentError("nothing was recorded: end it with trial.record(trainer, ...)")
        under_way.replace(trial.store)
    except Exception:
        return f"{dict(trial.settings)}: {traceback.format_exc(limit=-3)}"
    return None


def _remove(store: Path) -> None:
    """Remove what a run that was cut short has left."""
    for path in store.parent.glob(f"{store.name}*"):
        path.unlink()
