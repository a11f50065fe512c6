"""Alerts: rules as operators. Streams in, alert frames out."""

from streamlens.operators.alerts._rule import Rule
from streamlens.operators.alerts.gradients import exploding_gradients, vanishing_gradients
from streamlens.operators.alerts.health import health
from streamlens.operators.alerts.initialisation import poor_initialisation
from streamlens.operators.alerts.learning_rates import learning_rate_too_high, learning_rate_too_low
from streamlens.operators.alerts.loss_spike import loss_spike
from streamlens.operators.alerts.losses import diverging, loss_not_decreasing
from streamlens.operators.alerts.nonfinite import nonfinite_values
from streamlens.operators.alerts.overfitting import overfitting
from streamlens.operators.alerts.sizes import layer_oversized, layer_undersized
from streamlens.operators.alerts.units import dead_units, saturated_units
from streamlens.operators.alerts.updates import ratio_out_of_band, unchanged_weights

__all__ = [
    "Rule",
    "dead_units",
    "diverging",
    "exploding_gradients",
    "health",
    "layer_oversized",
    "layer_undersized",
    "learning_rate_too_high",
    "learning_rate_too_low",
    "loss_not_decreasing",
    "loss_spike",
    "nonfinite_values",
    "overfitting",
    "poor_initialisation",
    "ratio_out_of_band",
    "saturated_units",
    "unchanged_weights",
    "vanishing_gradients",
]
