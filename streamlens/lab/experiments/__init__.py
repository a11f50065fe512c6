"""Experiments: the same training under several conditions and seeds, and what follows from it.

A script states four things and hands them to an `Experiment`:

    def conditions(scale: Scale) -> list[Settings]:      # what differs between runs, seeds apart
        return [{"rate": rate, "epochs": scale.pick(smoke=1, digits=40, full=100)} for rate in (0.1, 1.0)]

    def train(trial: Trial) -> None:                     # one run: in a process of its own, seeded
        trainer = trial.trainer("AlexNetMini", learning_rate=trial["rate"], epochs=trial["epochs"])
        trial.record(trainer, trainer.lens.pipe(sl.uw_ratio()))

    def analyse(results: Results) -> Findings:           # tables, figures and sentences, from all runs
        last = results.last("test_accuracy")
        return Findings(tables={"accuracy": interval(last, by=["rate"], bounds=SHARE)}, ...)

    experiment = Experiment("rates", conditions, train, analyse)
    if __name__ == "__main__":
        experiment.main()

What is given with that:

- **Runs** go in parallel, one thread each, with a progress bar. Each becomes a run store of its own below
  `<out>/<name>/runs`, with its settings in its metadata, which takes its name when it is complete. A run that
  is there is not run again, one that was cut short is; a run that raises leaves the others alone and is told
  in the end. What is complete depends on settings alone: after a change of the code, say `--fresh`.
- **Settings** are names to texts, numbers, truth values or None. `dataset` and `seed` are added to those
  of the condition. All that a run depends on belongs into them.
- **Results** are read from the run stores as pandas tables, with a column for each setting, and left as CSV
  (a file a topic) in `<out>/<name>`.
- **Comparisons** are means over seeds with 95% intervals (`interval`), of differences run by run where
  conditions share their seeds (`paired`). Shares and correlations (`SHARE`, `CORRELATION`) have intervals
  that stay within what they can be.
- **Figures** become SVG and HTML in the colours of the views, tables CSV, and `findings.md` has all of it.

The command line of every script: `--dataset`, `--data-dir`, `--smoke`, `--seeds`, `--jobs`, `--device`,
`--out`, `--fresh`. Needs `pip install "streamlens[lab,export]"`.
"""

from __future__ import annotations

from streamlens.lab.experiments.experiment import Experiment
from streamlens.lab.experiments.figures import Figure, curves, points
from streamlens.lab.experiments.findings import Findings, sentences
from streamlens.lab.experiments.results import CORRELATION, SHARE, Results, interval, paired
from streamlens.lab.experiments.scale import Scale
from streamlens.lab.experiments.trial import ExperimentError, Settings, Trial

__all__ = [
    "CORRELATION",
    "SHARE",
    "Experiment",
    "ExperimentError",
    "Figure",
    "Findings",
    "Results",
    "Scale",
    "Settings",
    "Trial",
    "curves",
    "interval",
    "paired",
    "points",
    "sentences",
]
