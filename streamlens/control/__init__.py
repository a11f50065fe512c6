"""Controllers: the ends of chains that steer the run."""

from streamlens.control.act import act
from streamlens.control.bounds import Bounds
from streamlens.control.clip_at import ClipAt
from streamlens.control.controller import Controller
from streamlens.control.decision import Decision
from streamlens.control.fixed_ratio import FixedRatio
from streamlens.control.freeze import Freeze
from streamlens.control.gradients import GradientController
from streamlens.control.noise_scale_batch import NoiseScaleBatch
from streamlens.control.ratio_lr import RatioLR
from streamlens.control.reduce_on_plateau import ReduceOnPlateau
from streamlens.control.rollback import Rollback
from streamlens.control.schedules import Constant, ExponentialDecay, Schedule, scheduled
from streamlens.control.set_rate import SetRate
from streamlens.control.stop import Stop

__all__ = [
    "Bounds",
    "ClipAt",
    "Constant",
    "Controller",
    "Decision",
    "ExponentialDecay",
    "FixedRatio",
    "Freeze",
    "GradientController",
    "NoiseScaleBatch",
    "RatioLR",
    "ReduceOnPlateau",
    "Rollback",
    "Schedule",
    "SetRate",
    "Stop",
    "act",
    "scheduled",
]
