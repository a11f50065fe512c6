"""The commands of the command line. `streamlens.cli` runs them."""

from __future__ import annotations

import enum
import importlib.metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from streamlens.lab.choices import Visualisation, built, known, loaded, positive, shown_as
from streamlens.lab.plugin_command import list_plugins
from streamlens.lab.replay_command import replay
from streamlens.lab.report_command import report
from streamlens.lab.run_commands import export, runs
from streamlens.lab.ui_command import ui

__all__ = ["app"]

app = typer.Typer(
    help="Train a small network and watch its training as streams.",
    no_args_is_help=True,
    add_completion=False,
    # Plain text: an error is one line, wherever it is printed.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(runs, name="runs")
app.command()(export)
app.command()(replay)
app.command()(report)
app.command("plugins")(list_plugins)
app.command("ui")(ui)


class RatioMode(enum.StrEnum):
    """What the ratio schedule multiplies."""

    BASE = "base"
    CURRENT = "current"


def _told(subsample: int, threads: int, health: bool) -> dict[str, Any]:
    """What a run's metadata say of how it was recorded."""
    import torch

    from streamlens.operators.alerts.health import default_rules
    from streamlens.views.alerts import RULES

    rules = {RULES: ", ".join(default_rules())} if health else {}
    return {"subsample": subsample, "threads": threads, "torch": torch.__version__, **rules}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"streamlens {importlib.metadata.version('streamlens')}")
        raise typer.Exit


@app.callback()
def streamlens(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Train a small network and watch its training as streams."""


@app.command()
def train(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="AlexNetMini, ConvNet (Kingma and Ba), DenseNet, FullyConnected, ResNet18, TransformerLM or "
            "VGG.",
            callback=known("model", "models", "MODELS"),
        ),
    ] = "AlexNetMini",
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            "-d",
            help="digits (comes along), MNIST, FashionMNIST, CIFAR10 or CIFAR100 (see --data-dir).",
            callback=known("data set", "data", "DATASETS"),
        ),
    ] = "digits",
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            help="Folder with the published files of the data set, or of folders named after data sets.",
            show_default="~/.cache/streamlens",
        ),
    ] = None,
    download: Annotated[
        bool,
        typer.Option("--download", help="Download files that --data-dir lacks.", show_default="off"),
    ] = False,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            help="Height and width to resize images to.",
            min=1,
            show_default="its own; digits: 32",
        ),
    ] = None,
    whiten: Annotated[
        bool,
        typer.Option(
            "--whiten",
            help="Whiten the images (ZCA): pixels become uncorrelated. Slow for large ones.",
            show_default="off",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Examples an update.", min=1)] = 128,
    epochs: Annotated[
        int, typer.Option("--epochs", "-e", help="Passes through the training set.", min=1)
    ] = 10,
    init: Annotated[
        str,
        typer.Option(
            "--init",
            help="Initialisation: default (PyTorch's), kaiming_normal, kaiming_uniform, lecun_normal, "
            "orthogonal, xavier_normal or xavier_uniform.",
            callback=known("initialisation", "initialisation", "INITIALISATIONS"),
        ),
    ] = "default",
    optimizer: Annotated[
        str,
        typer.Option(
            "--optimizer",
            "-o",
            help="One of torch.optim: Adam, AdamW, SGD, RMSprop and so on.",
            callback=known("optimizer", "optimizers", "OPTIMIZERS"),
        ),
    ] = "Adam",
    learning_rate: Annotated[
        float,
        typer.Option("--learning-rate", "-l", help="Learning rate, above 0.", callback=positive),
    ] = 3e-3,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            help="Of the learning rate: constant, exponential (times 0.95 after each epoch), or ratio "
            "(set after each update so that the update-to-weight ratio comes to --target).",
            callback=known("schedule", "optimizers", "SCHEDULES"),
        ),
    ] = "constant",
    target: Annotated[
        float,
        typer.Option(
            "--target", help="Update-to-weight ratio that --schedule ratio aims at.", callback=positive
        ),
    ] = 1e-3,
    ratio_mode: Annotated[
        RatioMode,
        typer.Option(
            "--ratio-mode",
            help="What --schedule ratio multiplies: the base rate (settles between it and the ideal one) or "
            "the current rate (reaches the target).",
        ),
    ] = RatioMode.BASE,
    subsample: Annotated[int, typer.Option("--subsample", "-s", help="Watch every n-th step.", min=1)] = 1,
    depth: Annotated[
        int,
        typer.Option("--depth", help="Watch the modules at this depth; -1: the leaves.", min=-1),
    ] = -1,
    visualisation: Annotated[
        list[Visualisation],
        typer.Option(
            "--visualisation",
            "-v",
            help="Show the run as TensorBoard events, as a table in the console, as charts of matplotlib (a "
            "picture, and a window where there is a screen), as charts of Altair on a live page (its address "
            "is printed; opened where there is a screen), as rows of CSV, JSON or Parquet, or not at all. "
            "May be repeated.",
        ),
    ] = [Visualisation.TB],  # noqa: B006 - typer copies it
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-V",
            help="Print a line an epoch and, in the end, what was computed and what it cost.",
            show_default="off",
        ),
    ] = False,
    ratio: Annotated[
        bool, typer.Option("--ratio", help="Update-to-weight ratio of each layer.", show_default="off")
    ] = False,
    norm: Annotated[
        bool,
        typer.Option(
            "--norm", help="2-norms of each layer's weights and weight gradients.", show_default="off"
        ),
    ] = False,
    variance: Annotated[
        bool,
        typer.Option(
            "--variance", help="Variances of each layer's weights and weight gradients.", show_default="off"
        ),
    ] = False,
    histogram: Annotated[
        bool,
        typer.Option(
            "--histogram", help="Histograms of each layer's weights and weight gradients.", show_default="off"
        ),
    ] = False,
    spectral_norm: Annotated[
        bool,
        typer.Option(
            "--spectral-norm", help="Largest singular value of each layer's weights.", show_default="off"
        ),
    ] = False,
    hessian: Annotated[
        bool,
        typer.Option(
            "--hessian",
            help="The five largest eigenvalues of the loss's Hessian, once an epoch.",
            show_default="off",
        ),
    ] = False,
    health: Annotated[
        bool,
        typer.Option("--health", help="Alerts where something is wrong with the run.", show_default="off"),
    ] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="A metric by name, with arguments: 'norm(weights, order=1) | ema(0.9)'. May be repeated; "
            "`streamlens plugins` lists what there is.",
            show_default=False,
        ),
    ] = None,
    train_accuracy: Annotated[
        bool,
        typer.Option(
            "--train-accuracy", help="Accuracy on the training set after each epoch.", show_default="off"
        ),
    ] = False,
    test_accuracy: Annotated[
        bool,
        typer.Option(
            "--test-accuracy", help="Accuracy on the test set after each epoch.", show_default="off"
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", help="Of initial weights, dropout and order of batches.", min=0, max=2**32 - 1
        ),
    ] = 0,
    threads: Annotated[
        int,
        typer.Option(
            "--threads", help="CPU threads of PyTorch; networks this small train fastest on one.", min=1
        ),
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for what the run leaves.", show_default="runs/<date>-<model>-<dataset>"
        ),
    ] = None,
) -> None:
    """Train a model and leave a folder with run.db, TensorBoard events and report.html.

    The exit status is 1 if the training ended but something could not be recorded.
    """
    # Imported here, so that --help and --version answer at once.
    import torch

    from streamlens.errors import StreamlensError
    from streamlens.lab.metrics import parse_metric
    from streamlens.lab.recording import chains, default_folder
    from streamlens.lab.seeding import seed_everything
    from streamlens.lab.session import Session
    from streamlens.lab.trainer import Trainer

    shown = shown_as(visualisation)
    measure = [
        topic
        for topic, wanted in (("train_accuracy", train_accuracy), ("test_accuracy", test_accuracy))
        if wanted
    ]
    seed_everything(seed)
    torch.set_num_threads(threads)
    data = loaded(dataset, data_dir, download, image_size, whitened=whiten)
    trainer = Trainer(
        built(model, data, init),
        data,
        optimizer=optimizer,
        learning_rate=learning_rate,
        schedule=schedule,
        target=target,
        ratio_mode=ratio_mode.value,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        measure=measure,
        metadata={
            **_told(subsample, threads, health),
            "init": init,
            "image_size": data.image_size,
            "whitened": whiten,
        },
    )
    try:
        texts = [*(["hessian_eigenvalues"] if hessian else []), *(metric or [])]
        streams = chains(
            trainer.lens,
            ratio=ratio,
            norm=norm,
            variance=variance,
            histogram=histogram,
            spectral_norm=spectral_norm,
            health=health,
            metrics=[parse_metric(text, trainer.fixed) for text in texts],
            emitted=[*measure, *(["learning_rate.action"] if schedule == "ratio" else [])],
            subsample=subsample,
            depth=depth,
            epoch=len(trainer.loader),
        )
    except (StreamlensError, ValueError) as error:
        trainer.lens.close()
        wrong = "--metric" if isinstance(error, ValueError) else "--depth"
        raise typer.BadParameter(str(error), param_hint=f"'{wrong}'") from None
    session = Session(trainer, out or default_folder(model, dataset), show=shown, verbose=verbose)
    raise typer.Exit(session.run(streams))
