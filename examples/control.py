"""Three learning rates, each 100 times the last, brought to one target; ends in a figure.

Run it with `python examples/control.py`; it leaves `control.html` in the current folder. Each rate trains
a network on handwritten digits twice: once kept as it is, once steered by `RatioLR`, which multiplies the
rate after each update by the target ratio over the mean ratio that it sees.
"""

from __future__ import annotations

import altair as alt
import pandas as pd
import torch
from torch import nn

import streamlens as sl
from streamlens.lab import Trainer, load_dataset

__all__ = ["main", "train"]

TARGET = 1e-3
BASE_RATES = (1e-4, 1e-2, 1.0)


def train(base: float, epochs: int, *, steered: bool) -> tuple[pd.DataFrame, float]:
    """Train, and give the mean update-to-weight ratio and the rate of each step, and the test accuracy."""
    torch.manual_seed(0)
    data = load_dataset("digits")
    model = nn.Sequential(
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    trainer = Trainer(model, data, optimizer="SGD", learning_rate=base, epochs=epochs, batch_size=64)
    steps: list[dict[str, float]] = []

    def note(frame: sl.Frame) -> None:
        ratio = sum(frame.to_dict().values()) / len(frame)
        rate = trainer.optimizer.param_groups[0]["lr"]
        steps.append({"step": frame.step, "ratio": ratio, "rate": rate})

    with trainer.lens as lens:
        lens.pipe(sl.uw_ratio()).subscribe(note)
        if steered:
            # `smoothing` weighs the newest ratio: those of single batches are noisy.
            controller = sl.control.RatioLR(target=TARGET, mode="current", smoothing=0.5, slew_limit=1.5)
            lens.pipe(sl.uw_ratio()).subscribe(controller)
        results = trainer.fit()
    return pd.DataFrame(steps), results[-1].test_accuracy or 0.0


def figure(runs: pd.DataFrame) -> alt.HConcatChart:
    """Ratios and rates of all runs over steps; the target as a rule."""
    shared = {
        "x": alt.X("step:Q", title="step (optimizer updates)"),
        "color": alt.Color("base:N", title="base learning rate"),
        "strokeDash": alt.StrokeDash(
            "run:N", title=None, scale=alt.Scale(domain=["RatioLR", "constant"], range=[[1, 0], [5, 4]])
        ),
    }
    log = alt.Scale(type="log", nice=False)
    ratios = (
        alt.Chart(runs, title="mean update-to-weight ratio", width=420, height=300)
        .mark_line(strokeWidth=1.5)
        .encode(y=alt.Y("smoothed:Q", title=None, scale=log), **shared)
    )
    where = alt.Chart(pd.DataFrame({"target": [TARGET], "label": [f"target {TARGET:g}"]})).encode(
        y="target:Q"
    )
    label = where.mark_text(align="right", baseline="bottom", dy=-3, fontWeight="bold")
    target = where.mark_rule(strokeWidth=2) + label.encode(x=alt.value("width"), text="label:N")
    rates = (
        alt.Chart(runs, title="learning rate", width=420, height=300)
        .mark_line(strokeWidth=1.5)
        .encode(y=alt.Y("rate:Q", title=None, scale=log), **shared)
    )
    return alt.hconcat(alt.layer(ratios, target), rates)


def main(out: str = "control.html", epochs: int = 6) -> pd.DataFrame:
    """Train with each rate, constant and steered; draw the ratios, print where they ended."""
    torch.set_num_threads(1)
    runs = []
    for base in BASE_RATES:
        for steered in (False, True):
            rows, accuracy = train(base, epochs, steered=steered)
            rows["base"], rows["run"] = f"{base:g}", "RatioLR" if steered else "constant"
            rows["smoothed"] = rows.ratio.ewm(alpha=0.1).mean()
            runs.append(rows)
            end = rows.smoothed.iloc[-1]
            print(
                f"base rate {base:g}, {rows.run.iloc[0]}: ratio {end:.1e}, "
                f"rate {rows.rate.iloc[-1]:.1e}, test accuracy {accuracy:.1%}"
            )
    result = pd.concat(runs)
    figure(result).save(out)
    return result


if __name__ == "__main__":
    main()
