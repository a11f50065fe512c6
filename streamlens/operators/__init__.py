"""Operators: streams of frames in, streams of frames out."""

from collections.abc import Callable

from streamlens.operators.across_layers import across_layers
from streamlens.operators.adam_moments import adam_moments
from streamlens.operators.adversarial_susceptibility import adversarial_susceptibility
from streamlens.operators.alerts import (
    dead_units,
    diverging,
    exploding_gradients,
    health,
    layer_oversized,
    layer_undersized,
    learning_rate_too_high,
    learning_rate_too_low,
    loss_not_decreasing,
    loss_spike,
    nonfinite_values,
    overfitting,
    poor_initialisation,
    ratio_out_of_band,
    saturated_units,
    unchanged_weights,
    vanishing_gradients,
)
from streamlens.operators.align import AlignedFrame, align, combine
from streamlens.operators.cosine import cosine
from streamlens.operators.dead_fraction import dead_fraction
from streamlens.operators.diff import diff
from streamlens.operators.distance_from_start import distance_from_start
from streamlens.operators.effective_lr import effective_lr
from streamlens.operators.ema import ema
from streamlens.operators.flight_recorder import FlightRecorder, flight_recorder
from streamlens.operators.generalisation_gap import generalisation_gap
from streamlens.operators.gradient_noise_scale import gradient_noise_scale
from streamlens.operators.gradient_snr import gradient_snr
from streamlens.operators.hessian_eigenvalues import hessian_eigenvalues
from streamlens.operators.hessian_trace import hessian_trace
from streamlens.operators.histogram import histogram
from streamlens.operators.linear_cka import linear_cka
from streamlens.operators.loss import loss
from streamlens.operators.loss_decrease import loss_decrease
from streamlens.operators.per_epoch import per_epoch
from streamlens.operators.per_step import per_step
from streamlens.operators.quantiles import median, percentile_bands, quantiles
from streamlens.operators.ratio import ratio, uw_ratio
from streamlens.operators.saturation import saturation
from streamlens.operators.scan import scan
from streamlens.operators.selection import between, every, layers, per_layer, rename, topic, where
from streamlens.operators.sharpness import sharpness
from streamlens.operators.singular_values import condition_number, effective_rank, singular_values
from streamlens.operators.smooth import smooth
from streamlens.operators.spectral_norm import spectral_norm, stable_rank
from streamlens.operators.statistics import (
    absmax,
    kurtosis,
    maximum,
    mean,
    minimum,
    nonfinite,
    norm,
    reduce,
    rms,
    skewness,
    std,
    total,
    var,
    zero_fraction,
)
from streamlens.operators.svcca import svcca
from streamlens.operators.test_accuracy import test_accuracy
from streamlens.operators.train_accuracy import train_accuracy
from streamlens.operators.unit_saturation import unit_saturation
from streamlens.operators.when import when
from streamlens.operators.window import window
from streamlens.stream import Operator

__all__ = [
    "AlignedFrame",
    "FlightRecorder",
    "absmax",
    "across_layers",
    "adam_moments",
    "adversarial_susceptibility",
    "align",
    "between",
    "combine",
    "condition_number",
    "cosine",
    "dead_fraction",
    "dead_units",
    "diff",
    "distance_from_start",
    "diverging",
    "effective_lr",
    "effective_rank",
    "ema",
    "every",
    "exploding_gradients",
    "flight_recorder",
    "generalisation_gap",
    "gradient_noise_scale",
    "gradient_snr",
    "health",
    "hessian_eigenvalues",
    "hessian_trace",
    "histogram",
    "kurtosis",
    "layer_oversized",
    "layer_undersized",
    "layers",
    "learning_rate_too_high",
    "learning_rate_too_low",
    "linear_cka",
    "loss",
    "loss_decrease",
    "loss_not_decreasing",
    "loss_spike",
    "maximum",
    "mean",
    "median",
    "minimum",
    "nonfinite",
    "nonfinite_values",
    "norm",
    "overfitting",
    "per_epoch",
    "per_layer",
    "per_step",
    "percentile_bands",
    "poor_initialisation",
    "quantiles",
    "ratio",
    "ratio_out_of_band",
    "reduce",
    "rename",
    "rms",
    "saturated_units",
    "saturation",
    "scan",
    "sharpness",
    "singular_values",
    "skewness",
    "smooth",
    "spectral_norm",
    "stable_rank",
    "std",
    "svcca",
    "test_accuracy",
    "topic",
    "total",
    "train_accuracy",
    "unchanged_weights",
    "unit_saturation",
    "uw_ratio",
    "vanishing_gradients",
    "var",
    "when",
    "where",
    "window",
    "zero_fraction",
]


def load(name: str) -> Callable[..., Operator]:
    """An operator by its name, also one that an installed package brings along.

    Args:
        name: Its name: a shipped one's, or that of an entry point `streamlens.operators`.

    Returns:
        The operator's function: `lens.pipe(sl.operators.load("norm")("weights"))`.

    Raises:
        PluginError: There is none of that name, or it cannot be loaded.
    """
    # Plug-ins know operators and sinks; this is the way up to them.
    from streamlens import plugins

    return plugins.load("operator", name)
