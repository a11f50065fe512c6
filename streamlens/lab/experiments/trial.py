"""`Trial`: one run of an experiment, from its settings to a complete run store."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from reactivex import Observable

import streamlens as sl
from streamlens.chain import ErrorReport
from streamlens.errors import RunStoreError, StreamlensError
from streamlens.frame import Frame
from streamlens.lab.data import ImageDataset, load_dataset, whiten
from streamlens.lab.initialisation import initialise
from streamlens.lab.models import make_model
from streamlens.lab.trainer import EpochResult, Trainer
from streamlens.runs import list_runs

__all__ = ["ExperimentError", "Settings", "Trial", "is_complete", "store_of"]

Settings: TypeAlias = Mapping[str, str | int | float | bool | None]
"""What a run depends on."""

_DIGITS: Final = 8
"""The digits' own size: what the networks of the lab take for CIFAR is sixteen times the work."""

_PATIENCE: Final = 60.0
"""Seconds that the run store gets in the end."""


class ExperimentError(StreamlensError, RuntimeError):
    """Runs of an experiment that failed, or a run that could not be recorded."""


def store_of(folder: Path, settings: Settings) -> Path:
    """The run store of the run with these settings: a name to read, and one that is theirs alone."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()
    read = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(str(value) for value in settings.values()))
    return folder / f"{read[:80].strip('-')}-{digest[:12]}.db"


def is_complete(store: Path, settings: Settings) -> bool:
    """Whether a run with these settings is there from its beginning to its end."""
    try:
        [record] = list_runs(store)
    except (RunStoreError, ValueError):
        return False
    return bool(record.metadata.get("settings") == dict(settings))


@dataclass(frozen=True)
class Trial:
    """One run of an experiment. Index it by the name of a setting.

    Attributes:
        experiment: The name of the experiment.
        settings: What the run depends on, `dataset` and `seed` included.
        store: The run store to write.
        data_dir: Where the files of the data set are.
        device: Where to train.
    """

    experiment: str
    settings: Settings
    store: Path
    data_dir: Path | None = None
    device: str = "cpu"

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    def data(self, *, whitened: bool = False) -> ImageDataset:
        """The data set: digits as they are, 8x8 pixels large; others in their own size.

        Args:
            whitened: Whether it is ZCA-whitened.
        """
        name = self["dataset"]
        size = _DIGITS if name == "digits" else None
        data = load_dataset(name, data_dir=self.data_dir, image_size=size)
        return whiten(data) if whitened else data

    def model(self, name: str, *, init: str = "default", **options: Any) -> torch.nn.Module:
        """A model of the lab for the data set, on the device.

        Args:
            name: One of `MODELS`.
            init: One of `INITIALISATIONS`.
            **options: What it takes beside the sizes of the data.
        """
        data = self.data()
        sizes = {"channels": data.channels, "image_size": data.image_size, "classes": data.classes}
        return initialise(make_model(name, **sizes, **options), init).to(self.device)

    def trainer(self, model: torch.nn.Module, data: ImageDataset | None = None, **options: Any) -> Trainer:
        """A trainer with the seed of the trial, whose run store will tell the settings.

        Args:
            model: What to train.
            data: On what, if not the data set as it is.
            **options: Of `Trainer`.
        """
        known = {"experiment": self.experiment, "settings": dict(self.settings)}
        return Trainer(model, data or self.data(), seed=self["seed"], metadata=known, **options)

    def record(self, trainer: Trainer, *streams: Observable[Frame]) -> list[EpochResult]:
        """Train to the end, with streams and what the trainer measures in the run store.

        Args:
            trainer: What to run. Its lens is closed in the end.
            *streams: Out of the trainer's lens.

        Returns:
            What each epoch came to.

        Raises:
            ExperimentError: Something failed on the way, so that the record has gaps.
        """
        lens, sink = trainer.lens, sl.sinks.RunStore(self.store)
        reports: list[ErrorReport] = []
        lens.errors.subscribe(reports.append)
        try:
            for stream in (*streams, *(lens.pipe(sl.topic(topic)) for topic in trainer.measured)):
                stream.subscribe(sink)
            results = trainer.fit()
        finally:
            written = lens.close(timeout=_PATIENCE)
        if reports or not written:
            why = "; ".join(map(str, reports)) or f"the run store took over {_PATIENCE:.0f} s"
            raise ExperimentError(f"the record of {dict(self.settings)} has gaps: {why}")
        return results
