"""`saturation`: how much of the room that a layer's units span its outputs use."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.nodes import stateful
from streamlens.operators._places import Places, check_places, check_unit_dim, rows_of
from streamlens.operators._raw_windows import Gathered, RawWindow, check_window
from streamlens.operators._spectrum import directions_needed
from streamlens.operators._tensors import tensors_of, wide
from streamlens.operators._windowed import StepWindows, Windowed
from streamlens.stream import Operator, Stream

__all__ = ["saturation"]


def saturation(
    topic: str | None = "activations",
    *,
    window: int = 100,
    share: float = 0.99,
    places: Places = "each",
    unit_dim: int | None = None,
    max_units: int = 4096,
    max_rows: int | None = None,
) -> Operator:
    """The share of a layer's covariance eigendirections that hold 99% of its outputs' variance.

    With the eigenvalues of the outputs' covariance matrix in falling order, l_1 >= l_2 >= ... >= l_d, it is
    k / d for the least k with l_1 + ... + l_k >= share * (l_1 + ... + l_d) (Shenk, Richter, Arpteg and Huss,
    Spectral Analysis of Latent Representations, 2019; the library delve). Near 1, the layer uses every
    direction that it has, and more units may help; near 0 it has many that it does not need.

    The covariance is that of all outputs of `window` steps in a row, aligned to step 0, and the result
    stands at the last of them. It cannot have a rank above n - 1, so that a window has to bring several times
    as many rows as the layer has units. What is a row, where outputs have places (pixels of a
    convolution, tokens of a sequence), is a choice:

    - `"each"`: every place of every example, one column a unit (delve's `channelwise`);
    - `"mean"`: the mean over the places of an example (delve's `mean`);
    - `"flatten"`: an example, with a column for every unit at every place.

    Input: raw activations, or another raw topic whose tensors have examples in their first dimension: (N, d),
    (N, C, H, W), (N, T, d) and the like, of any dtype. The result is topic `activations.saturation`, a
    float32 in (0, 1] a layer; NaN where nothing varies or less than two rows came. Rows with NaN or inf in
    them are left out and counted. Statistics are in float64, merged batch by batch (Chan, Golub and LeVeque,
    1983), and are part of the saved state.

    The cost is d^2 multiplications a row, a matrix of d^2 numbers kept for each layer, and its
    eigenvalues, which are the only thing that waits for a GPU, at the end of a window. `every(n)` in front
    takes every n-th step of the window; `max_rows` bounds the rows of a batch.

    Args:
        topic: The topic; None takes the stream as it is.
        window: Steps in a window.
        share: Of the variance, above 0 and at most 1.
        places: What becomes of the places of an output.
        unit_dim: The dimension that counts the units. Unless given, a Lens tells it by the module's class:
            channels of `nn.Conv1d` are dimension 1, features of `nn.Linear` the last, and an activation in
            an `nn.Sequential` has that of what comes before it. Where nothing tells, it is 1 for outputs
            with four dimensions or more, else the last.
        max_units: Layers with more columns are left out, and reported once.
        max_rows: The most rows of a batch, spread over all places alike; all of them unless given.

    Returns:
        The operator.

    Raises:
        TypeError: The topic is not a name.
        ValueError: An option out of range.
        StreamlensError: When applied: the stream carries numbers and not tensors.
    """
    operator = "saturation"
    check_window(operator, window)
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not number or not 0 < share <= 1:
        raise ValueError(f"{operator}(share={share!r}): a share of the variance above 0 and at most 1")
    check_places(operator, places)
    check_unit_dim(operator, unit_dim)
    for name, value in (("max_units", max_units), ("max_rows", max_rows)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{operator}({name}={value!r}): a number from 1 on")

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = tensors_of(source, topic, operator)

        def make() -> _Saturation:
            return _Saturation(stream, window, float(share), places, unit_dim, max_units, max_rows)

        plan = f"{operator}(window={window}{'' if share == 0.99 else f', share={share:g}'}, {places})"
        return Windowed.of(
            stateful(stream, make, plan, marks=True, kind=Kind.STEP), StepWindows(window, window)
        )

    return apply


class _Saturation(RawWindow):
    """Keeps the number of rows, their mean, and the sum of the products of their deviations."""

    def __init__(
        self,
        stream: Stream,
        window: int,
        share: float,
        places: Places,
        unit_dim: int | None,
        max_units: int,
        max_rows: int | None,
    ) -> None:
        super().__init__(stream, "saturation", window, "saturation", unit_dim)
        self._share = share
        self._places = places
        self._max_units = max_units
        self._max_rows = max_rows

    def gather(self, held: Gathered | None, value: Tensor, unit_dim: int | None) -> Gathered:
        """The statistics of all rows so far."""
        rows = wide(rows_of(value, self._places, unit_dim, self._max_rows))
        units = rows.shape[1]
        if units > self._max_units:
            raise StreamlensError(
                f"saturation() leaves out outputs with {units} columns, above max_units={self._max_units}: "
                "its covariance matrix has the square of that. Pass max_units=, places='mean' or 'each', or "
                "select other layers with layers()"
            )
        if held is not None and held["mean"].shape != rows.shape[1:]:
            raise StreamlensError(
                f"saturation(): an output had {held['mean'].shape[0]} columns before, and {units} now: "
                "places='mean' or 'each' take examples of different sizes"
            )
        finite = rows.isfinite()
        self.count_finite(finite)
        used = finite.all(1, keepdim=True)
        count = used.sum().to(rows)
        rows = torch.where(used, rows, 0)
        mean = rows.sum(0) / count.clamp(min=1)
        rows = torch.where(used, rows - mean, 0)
        batch = {"count": count, "mean": mean, "products": rows.mT @ rows}
        return batch if held is None else _merged(held, batch)

    def finish(self, layers: Sequence[Gathered]) -> Tensor:
        """The saturation of each layer."""
        return torch.stack([_saturation(held, self._share) for held in layers]).float()


def _merged(a: Gathered, b: Gathered) -> Gathered:
    """The statistics of two lots of rows together."""
    a = {key: tensor.to(b["mean"].device) for key, tensor in a.items()}
    count = a["count"] + b["count"]
    part = b["count"] / count.clamp(min=1)
    apart = b["mean"] - a["mean"]
    products = a["products"] + b["products"] + torch.outer(apart, apart) * (a["count"] * part)
    return {"count": count, "mean": a["mean"] + apart * part, "products": products}


def _saturation(held: Gathered, share: float) -> Tensor:
    products = held["products"]
    units = products.shape[0]
    if not units:
        return products.new_full((), math.nan)
    # Decompositions raise, or never end, on what is not finite.
    finite = products.sum().isfinite()
    values = torch.linalg.eigvalsh(torch.where(finite, products, 0)).flip(0)
    needed = directions_needed(values, share)
    return torch.where(finite & (needed > 0), needed / units, math.nan)
