"""SGD with the rates that Adam was measured to have; and Adam with batch norm between layers or without.

Run it with `python examples/open_questions.py`; figures, tables and findings are left in
`runs/experiments/open_questions`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Final

import torch

import streamlens as sl
from streamlens.lab import experiments as ex
from streamlens.lab import seed_everything

__all__ = ["experiment"]

BASE: Final = 1e-3
FOLLOWED: Final = "SGD, Adam's rates"
CONSTANT: Final = "SGD, Adam's mean rates"
NETS: Final = {
    "batch norm": (True, "default"),
    "none": (False, "default"),
    "none, He": (False, "kaiming_normal"),
}


def conditions(scale: ex.Scale) -> list[ex.Settings]:
    """Adam, SGD with Adam's rates and with one rate; then optimizers with and without batch norm."""
    epochs = scale.pick(smoke=1, digits=16, full=40)
    width = scale.pick(smoke=4, digits=8, full=64)
    rates = scale.pick(smoke=(0.1,), digits=(0.1, 0.3), full=(0.01, 0.03, 0.1))
    methods = [
        ("Adam", BASE),
        (FOLLOWED, 0.0),
        (CONSTANT, 0.0),
        *((f"SGD, {rate:g}", rate) for rate in rates),
    ]
    pairs = [("Adam", 1e-3), ("SGD", 1e-1)]
    parts: list[ex.Settings] = []
    parts += [{"part": "rates", "method": method, "rate": rate, "net": "ConvNet"} for method, rate in methods]
    for net, (method, rate) in itertools.product(NETS, pairs):
        parts.append({"part": "norm", "method": method, "rate": rate, "net": net})
    return [{**part, "width": width, "epochs": epochs} for part in parts]


def build(trial: ex.Trial) -> torch.nn.Module:
    """The network of the first part."""
    return trial.model("ConvNet", width=trial["width"], hidden=16 * trial["width"], input_dropout=0.0)


def measured(trial: ex.Trial) -> dict[str, list[float]]:
    """Adam's effective rate of each parameter in each epoch: the mean of the medians of its steps."""
    seed_everything(trial["seed"])
    trainer = trial.trainer(build(trial), learning_rate=BASE, epochs=trial["epochs"], measure=())
    rates: dict[str, list[float]] = {}

    def keep(frame: sl.Frame) -> None:
        if frame.topic.startswith("effective_lr_median"):
            for name, rate in frame.to_dict().items():
                # A rate below 0, of momentum against the gradient, is none that SGD could be given.
                rates.setdefault(name, []).append(max(rate, 0.0) if math.isfinite(rate) else 0.0)

    trainer.lens.pipe(sl.effective_lr(of="parameters"), sl.per_epoch()).subscribe(keep)
    trainer.fit()
    trainer.lens.close()
    seed_everything(trial["seed"])  # so that weights, batches and dropout are Adam's
    return rates


def following(model: torch.nn.Module, rates: Mapping[str, list[float]], steps: int) -> torch.optim.SGD:
    """SGD with a rate for each parameter, which changes after so many steps."""
    groups = [{"params": [parameter], "name": name} for name, parameter in model.named_parameters()]
    optimizer = torch.optim.SGD(groups, lr=BASE)
    done = 0

    def set_rates(*_: object) -> None:
        nonlocal done
        for group in optimizer.param_groups:
            course = rates[group["name"]]
            group["lr"] = course[min(done // steps, len(course) - 1)]
        done += 1

    optimizer.register_step_pre_hook(set_rates)
    return optimizer


def train(trial: ex.Trial) -> None:
    """One run; losses and accuracies are recorded, and with batch norm or without second moments."""
    if trial["part"] == "norm":
        batch_norm, init = NETS[trial["net"]]
        model = trial.model("VGG", init=init, width=trial["width"], batch_norm=batch_norm)
        named = {"optimizer": trial["method"], "learning_rate": trial["rate"]}
        trainer = trial.trainer(model, epochs=trial["epochs"], **named)
        second = sl.where(lambda frame: frame.topic == "grad_var_estimate_median")
        due = trainer.lens.pipe(sl.every(max(trainer.steps // 12, 1)))
        streams = [due.pipe(sl.adam_moments(statistics="median"), second, sl.rename("second_moment"))]
    else:
        rates = measured(trial) if trial["method"] in (FOLLOWED, CONSTANT) else {}
        if trial["method"] == CONSTANT:
            rates = {name: [math.fsum(course) / len(course)] for name, course in rates.items()}
        model = build(trial)
        steps = math.ceil(len(trial.data().train) / 128)
        name = trial["method"].partition(",")[0]
        named = {"optimizer": following(model, rates, steps)} if rates else {"optimizer": name}
        trainer = trial.trainer(model, epochs=trial["epochs"], learning_rate=trial["rate"] or BASE, **named)
        streams = []
    trial.record(trainer, trainer.lens.pipe(sl.loss(), sl.per_epoch(), sl.rename("loss")), *streams)


def analyse(results: ex.Results) -> ex.Findings:
    """Whether SGD matches Adam, and what batch norm has to do with either."""
    last, loss, by = results.last("test_accuracy"), results.rows("loss"), ["method", "rate", "net"]
    first, norm = last[last.part == "rates"], last[last.part == "norm"]
    ends = results.last("loss").query("part == 'rates'")
    gained = ex.paired(norm[norm.net != "none, He"], "net", "none", by=["method", "rate"], bounds=ex.SHARE)
    second = results.rows("second_moment")
    ways = second[second.value > 0].groupby([*by, "seed", "layer"], sort=False).value
    growth = (ways.last() / ways.first()).map(math.log).groupby(level=[*by, "seed"], sort=False).mean()
    tables = {
        "accuracy with Adam's rates": ex.interval(first, by=["method"], bounds=ex.SHARE),
        "accuracy over Adam's": ex.paired(first, "method", "Adam", bounds=ex.SHARE),
        "loss over Adam's": ex.paired(ends, "method", "Adam", log=True),
        "accuracy with batch norm or without": ex.interval(norm, by=by, bounds=ex.SHARE),
        "gain by batch norm": gained,
        "growth of second moments": ex.interval(growth.map(math.exp).reset_index(), by=by, log=True),
    }
    spread = "{mean:+.1%} ({low:+.1%} to {high:+.1%})"
    answers = [
        *ex.sentences("{method}: test accuracy against Adam's " + spread, tables["accuracy over Adam's"]),
        *ex.sentences("{method} at {rate:g}: batch norm changes test accuracy by " + spread, gained),
    ]
    named = norm.assign(setting=norm.method + " " + norm.rate.map("{:g}".format))
    accuracy = ex.interval(named, by=["setting", "net"], bounds=ex.SHARE)
    figures: dict[str, ex.Figure] = {
        "rates": ex.curves(loss[loss.part == "rates"], x="epoch", color="method", log=True, title="loss"),
        "norm": ex.points(accuracy, x="setting", color="net", title="test accuracy", size=(420, 200)),
    }
    return ex.Findings(answers, tables, figures)


experiment = ex.Experiment("open_questions", conditions, train, analyse)

if __name__ == "__main__":
    experiment.main()
