"""Charts of a run: functions from a DataFrame to an Altair chart, and the report that hosts them."""

from streamlens.views.accuracy import accuracies
from streamlens.views.bands import percentile_bands
from streamlens.views.curvature import hessian_eigenvalues
from streamlens.views.heatmap import update_to_weight_ratio
from streamlens.views.histogram import histogram
from streamlens.views.loss import loss
from streamlens.views.metric import metric
from streamlens.views.norms import gradient_norms, weight_norms
from streamlens.views.progress import ratio_against_loss
from streamlens.views.rates import learning_rate
from streamlens.views.shipped import VIEWS, View, by_name
from streamlens.views.sources import data, filled, records, taken_apart, topics_of
from streamlens.views.stack import stack
from streamlens.views.theme import themed, vega_config
from streamlens.views.web.serve import serve

__all__ = [
    "VIEWS",
    "View",
    "accuracies",
    "by_name",
    "data",
    "filled",
    "gradient_norms",
    "hessian_eigenvalues",
    "histogram",
    "learning_rate",
    "loss",
    "metric",
    "percentile_bands",
    "ratio_against_loss",
    "records",
    "serve",
    "stack",
    "taken_apart",
    "themed",
    "topics_of",
    "update_to_weight_ratio",
    "vega_config",
    "weight_norms",
]
