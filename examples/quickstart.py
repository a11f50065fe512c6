"""Watch a network learn real handwritten digits in your own training loop; ends in a figure.

Run it with `python examples/quickstart.py`; it leaves `quickstart.html` in the current folder.
"""

from __future__ import annotations

import torch
from torch import nn

import streamlens as sl
from streamlens.lab import load_dataset, make_loader
from streamlens.views import gradient_norms, loss, stack, update_to_weight_ratio

__all__ = ["main"]


def main(out: str = "quickstart.html", epochs: int = 3) -> None:
    """Train, and draw what was seen."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_dataset("digits")
    loader = make_loader(data.train, batch_size=64, shuffle=True, seed=0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(8 * 8 * 8, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    criterion = nn.CrossEntropyLoss()

    with sl.observe(model, loss=criterion) as lens:
        table = sl.sinks.Table()
        lens.pipe(sl.topic("loss")).subscribe(table)
        lens.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(table)
        lens.pipe(sl.norm("weight_gradients")).subscribe(table)
        for _ in lens.epochs(epochs):
            for x, y in lens.batches(loader):
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()

    rows = dict(iter(table.dataframe.groupby("topic", observed=True)))
    figure = stack(
        loss(rows["loss"]),
        update_to_weight_ratio(rows["uw_ratio.ema"]),
        gradient_norms(rows["weight_gradients.norm2"]),
    )
    figure.save(out, inline=False)
    losses = rows["loss"].value
    print(f"the loss went from {losses.iloc[0]:.2f} to {losses.iloc[-1]:.2f}: see {out}")


if __name__ == "__main__":
    main()
