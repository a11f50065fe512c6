"""Freezing layers that have come to rest by SVCCA, and telling layers that are too small or too large.

What freezing saves and costs on a convolutional network; and two rules that judge layers by their
saturation, on nets made too narrow and too wide. Run it with `python examples/layer_freezing.py`; figures,
tables and findings are left in `runs/experiments/layer_freezing`.
"""

from __future__ import annotations

import time
from typing import Final

import pandas as pd
from torch import nn

import streamlens as sl
from streamlens.control import Freeze
from streamlens.lab import experiments as ex
from streamlens.lab import make_loader

__all__ = ["experiment"]

THRESHOLDS: Final = {f"frozen above {above:g}": above for above in (0.999, 0.995, 0.99)}
WATCHED: Final = "watched only"
RULES: Final = ("layer_undersized", "layer_oversized")


def conditions(scale: ex.Scale) -> list[ex.Settings]:
    """Thresholds of freezing, beside a run that only watches and a plain one; then widths of layers."""
    epochs = scale.pick(smoke=4, digits=30, full=60)
    width = scale.pick(smoke=4, digits=16, full=64)
    widths = scale.pick(smoke=(2, 64), digits=(2, 8, 32, 128, 512), full=(2, 16, 128, 1024, 4096))
    plans = ("plain", WATCHED, *THRESHOLDS)[: 3 if scale.smoke else 5]
    freezing: list[ex.Settings] = [
        {"part": "freezing", "plan": plan, "width": width, "epochs": epochs} for plan in plans
    ]
    return freezing + [{"part": "sizes", "plan": "", "width": units, "epochs": epochs} for units in widths]


def train(trial: ex.Trial) -> None:
    """One run; CPU time, similarities and actions of freezing, or saturation and alerts, are recorded."""
    width, sizes = trial["width"], trial["part"] == "sizes"
    model = (
        trial.model("FullyConnected", hidden=(width, width))
        if sizes
        else trial.model("ConvNet", width=width, hidden=8 * width, input_dropout=0.0)
    )
    trainer = trial.trainer(model, learning_rate=1e-3, epochs=trial["epochs"])
    lens, epoch = trainer.lens, len(trainer.loader)
    if sizes:
        hidden = lens.pipe(sl.layers("layers.1", "layers.3"))
        rules = [lens.pipe(getattr(sl, rule)(window=2 * epoch, start=(2, 2))) for rule in RULES]
        trial.record(trainer, hidden.pipe(sl.saturation(window=2 * epoch), sl.rename("saturation")), *rules)
        return
    start = time.process_time()
    spent = sl.scan(lambda _, frame: time.process_time() - start, 0.0)
    streams = [lens.pipe(sl.topic("epoch_finished"), spent, sl.rename("cpu_seconds"))]
    if trial["plan"] != "plain":
        probe, _ = next(iter(make_loader(trainer.data.train, batch_size=128, shuffle=False)))
        weighted = lens.pipe(sl.layers(nn.Conv2d, nn.Linear), sl.every(2 * epoch))
        alike = weighted.pipe(sl.svcca(probe.to(trial.device), reference="previous", max_rows=512))
        above = THRESHOLDS.get(trial["plan"], 0.99)
        alike.subscribe(Freeze(above=above, patience=2, dry_run=trial["plan"] == WATCHED))
        streams += [alike, lens.pipe(sl.topic("frozen.action"))]
    trial.record(trainer, *streams)


def frozen_share(results: ex.Results) -> pd.DataFrame:
    """The share of all layer-steps, layers times steps, in which a layer was frozen."""
    rows = results.rows("svcca")
    steps = rows.groupby(["plan", "seed"]).step.max()
    layers = rows.groupby(["plan", "seed"]).layer.nunique()
    actions = results.rows("frozen.action") if "frozen.action" in results.topics else rows[:0]
    actions = actions[actions.plan != WATCHED].set_index(["plan", "seed"])
    left = ((steps - actions.step) / steps).groupby(level=["plan", "seed"]).sum()
    share = (left / layers).reindex(steps.index).fillna(0.0).rename("value").reset_index()
    order = [WATCHED, *THRESHOLDS]
    return share.sort_values("plan", key=lambda plans: plans.map(order.index))


def verdicts(results: ex.Results) -> pd.DataFrame:
    """In how many runs of each width each rule told of a layer, beside the accuracy and the saturation."""
    runs = results.last("test_accuracy").query("part == 'sizes'")
    table = ex.interval(runs, by=["width"], bounds=ex.SHARE)
    for rule in RULES:
        topic = f"alerts.{rule}"
        told = results.rows(topic) if topic in results.topics else runs[:0]
        table[rule] = table.width.map(told.groupby("width").seed.nunique()).fillna(0).astype(int)
    saturation = results.last("saturation").groupby(["width", "layer"]).value.mean().unstack()
    return table.merge(saturation.reset_index(), on="width")


def analyse(results: ex.Results) -> ex.Findings:
    """What freezing saves and costs, and which widths the rules tell of."""
    accuracy = results.last("test_accuracy").query("part == 'freezing'")
    seconds = results.last("cpu_seconds")
    tables = {
        "accuracy": ex.interval(accuracy, by=["plan"], bounds=ex.SHARE),
        "accuracy gained": ex.paired(accuracy, "plan", "plain", bounds=ex.SHARE),
        "CPU time over plain": ex.paired(seconds, "plan", "plain", log=True),
        "CPU time over watched": ex.paired(seconds, "plan", WATCHED, log=True),
        "share of layer-steps frozen": ex.interval(frozen_share(results), by=["plan"], bounds=ex.SHARE),
        "rules": verdicts(results),
    }
    spread = "{mean:+.1%} ({low:+.1%} to {high:+.1%})"
    factor = "{mean:.2f} ({low:.2f} to {high:.2f})"
    answers = [
        *ex.sentences("{plan}: test accuracy against plain training " + spread, tables["accuracy gained"]),
        *ex.sentences("{plan}: CPU time over plain training " + factor, tables["CPU time over plain"]),
        *ex.sentences("{plan}: share of layer-steps frozen " + factor, tables["share of layer-steps frozen"]),
        *ex.sentences(
            "width {width}: layer_undersized in {layer_undersized} of {runs} runs, layer_oversized in "
            "{layer_oversized}; test accuracy {mean:.1%} ({low:.1%} to {high:.1%})", tables["rules"],
        ),
    ]  # fmt: skip
    alike = results.rows("svcca")
    saturation = results.rows("saturation")
    figures: dict[str, ex.Figure] = {
        "similarity": ex.curves(alike[alike.plan == WATCHED], color="layer", title="SVCCA with 2 epochs ago"),
        "accuracies": ex.points(
            tables["accuracy"], x="plan", color="plan", title="test accuracy", size=(620, 160)
        ),
        "saturation": ex.curves(
            saturation, color="width", column="layer", bounds=ex.SHARE, title="saturation"
        ),
    }
    return ex.Findings(answers, tables, figures)


experiment = ex.Experiment("layer_freezing", conditions, train, analyse)

if __name__ == "__main__":
    experiment.main()
