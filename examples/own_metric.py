"""A metric of your own in a few lines: does each update move against its gradient? Ends in a figure.

Momentum carries updates on when the gradient has turned. The metric is the share of weights whose
update has the sign of minus the gradient, layer by layer. Run it with `python examples/own_metric.py`.
"""

from __future__ import annotations

from itertools import chain, islice, repeat

import altair as alt
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.lab import load_dataset, make_loader

__all__ = ["main"]

Values = tuple[Tensor, ...]


def agreement(updates: Values, gradients: Values) -> Tensor:
    """The share of weights that moved against their gradient, a layer each."""
    pairs = zip(updates, gradients, strict=True)
    return torch.stack([(u.sign() == -g.sign()).float().mean() for u, g in pairs])


def main(out: str = "own_metric.html", steps: int = 200) -> None:
    """Compare SGD with and without momentum."""
    torch.set_num_threads(1)
    data = load_dataset("digits")
    table = sl.sinks.Table()
    for momentum in (0.0, 0.9):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum)
        name = f"update_sign_agreement_momentum_{momentum:g}"
        metric = sl.combine("weight_updates", "weight_gradients", fn=agreement, name=name)
        with sl.observe(model) as lens:
            lens.pipe(metric, sl.ema(0.9)).subscribe(table)
            loader = make_loader(data.train, batch_size=64, shuffle=True, seed=0)
            batches = chain.from_iterable(repeat(loader))
            for x, y in islice(batches, steps):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    chart = (
        alt.Chart(table.dataframe)
        .mark_line()
        .encode(
            x=alt.X("step:Q", title="step (optimizer updates)"),
            y=alt.Y("value:Q", title="share of weights that moved against their gradient"),
            color=alt.Color("layer:N"),
            strokeDash=alt.StrokeDash("topic:N", title="metric"),
        )
        .properties(width=600, height=300)
    )
    chart.save(out)
    print(f"see {out}")


if __name__ == "__main__":
    main()
