"""The reduction protocol: from one tensor a layer to one number (or fixed-size vector) a layer.

A `Reduction` is a hashable value, so that equal ones are computed once however many chains ask for
them. Most are finished from a few `Statistic`s (sums, sums of squares, extremes), and those are
what is shared: the 2-norm, the root mean square and the mean of one tensor need one pass together.
Statistics of the parts of a tensor merge into those of the whole.
"""

from streamlens.reductions.bins import Bins, bin_edges
from streamlens.reductions.elements import (
    CHUNK,
    TINY,
    all_elements,
    chunks_of,
    double_where_known,
    flat_real,
    precise,
    real_size,
)
from streamlens.reductions.merging import centred_about, merge_statistics, statistics_to_merge
from streamlens.reductions.pieces import accumulate, square_of, statistics_of
from streamlens.reductions.protocol import FunctionReduction, Reduction, needed_statistics
from streamlens.reductions.rows import row_statistics
from streamlens.reductions.statistic import OF_MAGNITUDES, Statistic, Statistics
from streamlens.reductions.summaries import columns, summarise

__all__ = [
    "CHUNK",
    "OF_MAGNITUDES",
    "TINY",
    "Bins",
    "FunctionReduction",
    "Reduction",
    "Statistic",
    "Statistics",
    "accumulate",
    "all_elements",
    "bin_edges",
    "centred_about",
    "chunks_of",
    "columns",
    "double_where_known",
    "flat_real",
    "merge_statistics",
    "needed_statistics",
    "precise",
    "real_size",
    "row_statistics",
    "square_of",
    "statistics_of",
    "statistics_to_merge",
    "summarise",
]
