"""`python docs/make_views.py`: the pictures of `docs/views.md`, of a run on the digits of scikit-learn.

Needs `pip install "streamlens[lab,export]"` and Pillow.
Writes `docs/views/<view>.png`, each by the view's own function.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import streamlens as sl
from streamlens.runs import Run, read_run

FOLDER: Final = Path(__file__).with_name("views")
EPOCHS: Final = 12
BATCH: Final = 128


def record(path: Path) -> None:
    """Train a small network and record what the views draw.

    Args:
        path: Where the run store is made.
    """
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, test = order[:-360], order[-360:]
    model = nn.Sequential(
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    lens = sl.observe(model, loss=criterion, emits=["train_accuracy", "test_accuracy"])
    store = sl.sinks.RunStore(path)
    some = (images[train[:256]], labels[train[:256]])
    for chain in (
        lens.pipe(sl.topic("loss")),
        lens.pipe(sl.topic("learning_rate")),
        lens.pipe(sl.topic("train_accuracy")),
        lens.pipe(sl.topic("test_accuracy")),
        lens.pipe(sl.uw_ratio()),
        lens.pipe(sl.norm("weight_gradients")),
        lens.pipe(sl.norm("weights")),
        lens.pipe(sl.percentile_bands("weights")),
        lens.pipe(sl.every(14), sl.hessian_eigenvalues(3, loss=criterion, batch=some)),
    ):
        chain.subscribe(store)
    for _ in lens.epochs(EPOCHS):
        for batch in train[torch.randperm(len(train))].split(BATCH):
            optimizer.zero_grad()
            criterion(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        for name, part in (("train_accuracy", train), ("test_accuracy", test)):
            with torch.no_grad():
                right = model(images[part]).argmax(1) == labels[part]
            lens.emit(name, right.float().mean())
        schedule.step()
    lens.close()


def charts(run: Run) -> dict[str, Any]:
    """The views of a run, by their names.

    Args:
        run: A run as `record` leaves it.
    """
    rows = run.dataframe
    bands = rows("weights.percentile_bands")
    return {
        "loss": sl.views.loss(rows("loss"), learning_rate=rows("learning_rate")),
        "learning_rate": sl.views.learning_rate(rows("learning_rate")),
        "accuracies": sl.views.accuracies(
            {"training": rows("train_accuracy"), "test": rows("test_accuracy")}
        ),
        "update_to_weight_ratio": sl.views.update_to_weight_ratio(rows("uw_ratio")),
        "ratio_against_loss": sl.views.ratio_against_loss(rows("uw_ratio"), rows("loss")),
        "gradient_norms": sl.views.gradient_norms(rows("weight_gradients.norm2"), max_points=300),
        "weight_norms": sl.views.weight_norms(rows("weights.norm2")),
        "percentile_bands": sl.views.percentile_bands(bands[bands["layer"] == "0"], values="weights"),
        "hessian_eigenvalues": sl.views.hessian_eigenvalues(
            rows("hessian_eigenvalues"), rows("learning_rate")
        ),
    }


def main() -> int:
    """Train, draw and write."""
    FOLDER.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.db"
        record(path)
        with read_run(path) as run:
            for name, chart in charts(run).items():
                picture = FOLDER / f"{name}.png"
                sl.views.themed(chart).save(str(picture))
                # A quarter of the size, and no difference to be seen.
                with Image.open(picture) as drawn:
                    small = drawn.convert("RGB").quantize(64)
                small.save(picture, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
