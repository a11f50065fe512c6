"""Models, data and a trainer: what the command line, the examples and the benchmarks train.

Nothing here is needed to observe a model of your own. Needs `pip install "streamlens[lab]"`.
"""

from __future__ import annotations

from streamlens.lab.data import DATASETS, ZCA, ImageDataset, load_dataset, make_loader, whiten
from streamlens.lab.initialisation import INITIALISATIONS, initialise
from streamlens.lab.models import (
    MODELS,
    VGG,
    AlexNetMini,
    ConvNet,
    DenseNet,
    FullyConnected,
    ResNet18,
    TransformerLM,
    make_model,
)
from streamlens.lab.optimizers import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule
from streamlens.lab.seeding import seed_everything
from streamlens.lab.trainer import EpochResult, Trainer

__all__ = [
    "DATASETS",
    "INITIALISATIONS",
    "MODELS",
    "OPTIMIZERS",
    "SCHEDULES",
    "VGG",
    "ZCA",
    "AlexNetMini",
    "ConvNet",
    "DenseNet",
    "EpochResult",
    "FullyConnected",
    "ImageDataset",
    "ResNet18",
    "Trainer",
    "TransformerLM",
    "initialise",
    "load_dataset",
    "make_loader",
    "make_model",
    "make_optimizer",
    "make_schedule",
    "seed_everything",
    "whiten",
]
