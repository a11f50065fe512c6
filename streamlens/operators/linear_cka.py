"""`linear_cka`: how alike the representations of layers are, to an earlier checkpoint's or each other's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from streamlens.frame import Frame
from streamlens.nodes import Emitted
from streamlens.operators._base import relabelled
from streamlens.operators._isolated import isolated_copy
from streamlens.operators._model import FindModel
from streamlens.operators._places import Places
from streamlens.operators._representations import (
    ForwardProbe,
    Kept,
    Probe,
    Reference,
    RepresentationNode,
    Selectors,
    on_layers,
)
from streamlens.stream import Operator, Stream

__all__ = ["linear_cka"]

Between: TypeAlias = Literal["checkpoints", "layers"]
_BETWEEN: Final = ("checkpoints", "layers")


def linear_cka(
    probe: Any,
    *,
    between: Between = "checkpoints",
    reference: nn.Module | Mapping[str, Any] | Literal["previous"] | None = None,
    places: Places = "flatten",
    unit_dim: int | None = None,
    max_rows: int | None = 4096,
    forward: ForwardProbe | None = None,
    model: nn.Module | None = None,
) -> Operator:
    """The similarity of representations by linear centred kernel alignment.

    Input: the model, and fixed inputs of it. The outputs of a layer for that `probe` are a matrix X, (n,
    d), of n data points and d units, Y that of another one, (n, e); columns are centred. In terms of
    features,

        CKA(X, Y) = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F),

    which is the cosine of the Gram matrices X X^T and Y Y^T (Kornblith, Norouzi, Lee and Hinton, Similarity
    of Neural Network Representations Revisited, 2019). It is unchanged by rotations and by one scale for all,
    and, unlike that of `svcca`, weighs directions by their variance: it is meaningful with fewer data points
    than units, though few points make any two layers look alike.

    - `between="checkpoints"`: each layer with an earlier checkpoint of itself. The result is topic
      `linear_cka`, float32 in [0, 1] a layer. The checkpoint is `reference`: a model, or the state dict of an
      earlier state of this one, both copied when this is called; unless given, the model as it is at the
      first evaluation, whose own value is 1; with `"previous"`, the model at the evaluation before. What it
      comes to is part of the saved state.
    - `between="layers"`: each layer with every other. The result is topic `linear_cka.layers`, (layers,
      layers) of float32, with the layers' names as components. With `reference`, which may be
      another architecture, columns are the layers of that.

    When it is due, which layers and model it is taken of, and that nothing of the run is touched is as for
    `svcca`. NaN where nothing varies, and where an output has NaN or inf in it. Layers whose data
    points differ in number cannot be compared: NaN in the matrix; between checkpoints the layer is left
    out and reported once.

    Cost, each time: a copy of the model, a forward of the probe, and for each layer, or pair of them, in
    float64 n min(n, d) min(n, e) multiplications; where d > n, an eigendecomposition of size n beforehand.
    It waits for a GPU. Kept of a checkpoint are n min(n, d) numbers a layer.

    Args:
        probe: The inputs: a tensor, a tuple of arguments or a mapping of named ones, without labels.
        between: What is compared.
        reference: The checkpoint, or the other model; `"previous"` is the one at the evaluation before.
        places: What becomes of pixels and tokens: `"flatten"`, each is a unit of its own and examples are
            the data points, as in the paper; `"mean"` over those of an example; `"each"` is a data point.
        unit_dim: As for `svcca`.
        max_rows: The most data points; None for all.
        forward: A function of the model and the probe, in place of calling the one with the other.
        model: The model, on streams that come from no lens; held weakly.

    Returns:
        The operator.

    Raises:
        TypeError: The probe has no tensors, or the reference is none of those.
        ValueError: An option out of range, or layers that are compared place by place.
        StreamlensError: When applied: as for `svcca`.
    """
    operator = "linear_cka"
    given = Probe(operator, probe, places, unit_dim, max_rows, forward)
    if between not in _BETWEEN:
        raise ValueError(f"{operator}(between={between!r}): 'checkpoints' or 'layers'")
    if between == "layers" and places == "each":
        raise ValueError(
            f"{operator}(between='layers', places='each'): layers differ in how many places they have; "
            "'flatten' and 'mean' compare them by examples"
        )
    start = Reference(operator, reference)
    kind = _BetweenLayers if between == "layers" else _LinearCka

    def make(stream: Stream, find: FindModel, selectors: Selectors) -> RepresentationNode:
        return kind(stream, find, given, selectors, start)

    return on_layers(make, f"{operator}({between}, {places})", probe=given, reference=start, model=model)


class _LinearCka(RepresentationNode):
    """Keeps each layer's centred matrix X, or a smaller one of the same X X^T, with |X^T X| = 1."""

    def keep(self, rows: Tensor) -> Tensor:
        """The matrix, (n, min(n, d)), scaled."""
        rows = rows - rows.mean(0)
        n, units = rows.shape
        largest = rows.abs().amax() if rows.numel() else rows.new_zeros(())
        if not 0 < float(largest) < math.inf:
            return rows.new_full((n, 1), math.nan)
        rows = rows / largest  # whose fourth power could be out of range
        if units > n:
            values, vectors = torch.linalg.eigh(rows @ rows.mT)
            rows = vectors * values.clamp(min=0).sqrt()
        scaled: Tensor = rows / torch.linalg.matrix_norm(rows.mT @ rows).sqrt()
        return scaled

    def compare(self, now: Tensor, then: Tensor) -> Tensor:
        """The alignment of two."""
        return (now.mT @ then).square().sum().clamp(max=1)


class _BetweenLayers(_LinearCka):
    """Compares layers with each other, or with those of the reference."""

    def evaluate(self, model: nn.Module, frame: Frame) -> Emitted:
        """The matrix of all pairs."""
        if self._start.given:
            now, others = self.now_and_then(model)
        else:
            now = others = self.taken(isolated_copy(model).modules[0])
        if not now or not others:
            return None
        values = torch.stack([torch.stack(self._row(x, others)) for x in now.values()])
        return relabelled(
            frame, "linear_cka.layers", values.float(), layers=tuple(now), components=tuple(others)
        )

    def _row(self, now: Tensor, others: Kept) -> list[Tensor]:
        return [
            self.compare(now, other.to(now.device)) if len(now) == len(other) else now.new_full((), math.nan)
            for other in others.values()
        ]
