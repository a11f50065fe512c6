"""Scaling each layer's own step, after the update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.optim import LBFGS

from streamlens.capture.view import View
from streamlens.errors import StreamlensError
from streamlens.frame import Frame

if TYPE_CHECKING:
    from streamlens.capture.model import ParameterEntry
    from streamlens.control.controller import Controller

__all__ = ["TOPIC", "StepScaler", "sizes_of"]

TOPIC: Final = "step_scale.action"


class StepScaler:
    """Replaces W_k by W_{k-1} + s (W_k - W_{k-1}), each layer with its own s.

    Args:
        controller: On whose behalf.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._updates: list[Frame] = []

    def attached(self) -> None:
        """Ask for the updates of all parameters.

        Raises:
            StreamlensError: An optimizer holds copies of parameters, or another controller scales steps.
        """
        engine = self._controller.engine
        assert engine is not None
        if engine.copies:
            raise StreamlensError(
                f"{self._controller.name}(per_layer=True) changes the model's parameters after the update, "
                "and the optimizer would overwrite them with its copies: steer the rate instead"
            )
        self._controller.claim("layers' steps", None)
        if not self._controller.dry_run:
            self._controller.hold(engine.subscribe_view(View(topics=("parameter_updates",)), self._keep))

    def _keep(self, frame: Frame) -> None:
        self._updates = [f for f in self._updates if f.step == frame.step and not f.expired]
        self._updates.append(frame)

    def apply(self, scales: Mapping[str, float]) -> None:
        """Scale the step that was just made.

        Args:
            scales: The factor of each layer (or parameter, by its full name).

        Raises:
            StreamlensError: The updates are not there any more, or belong to copies of the parameters.
        """
        engine = self._controller.engine
        assert engine is not None
        if any(info.stands_in for info in engine.updates.owners.known):
            raise StreamlensError("the optimizer owns copies of the parameters, which would overwrite them")
        updates = {name: update for f in self._updates if not f.expired for name, update in f.items()}
        self._updates = []
        if not updates:
            raise StreamlensError("the updates to be scaled are gone: optimizers that step together mix them")
        moved: dict[int, tuple[Tensor, float]] = {}
        with torch.no_grad():
            for entry in engine.index.entries:
                scale = scales.get(entry.name, scales.get(entry.layer))
                update = updates.get(entry.name)
                if scale is None or update is None or scale == 1:
                    continue
                # Of a parameter that is spread over processes, the part that this one holds.
                entry.tensor.add_(update.to(entry.tensor.dtype), alpha=scale - 1)
                moved[id(entry.parameter)] = update, scale - 1
            for info in engine.updates.owners.known:
                if isinstance(info.optimizer, LBFGS):
                    _correct_last_step(info.optimizer, moved)


def _correct_last_step(optimizer: LBFGS, moved: Mapping[int, tuple[Tensor, float]]) -> None:
    """Make the next curvature pair of LBFGS that of the step as it was scaled.

    A pair is a change of the gradient and the step that made it, which LBFGS keeps as a direction `d` and a
    length `t` until the next gradient is known. Without this it would divide the change over one step by
    another, and its directions would grow without bound.
    """
    parameters = optimizer.param_groups[0]["params"]
    # The state of all parameters stands with the first.
    state = optimizer.state.get(parameters[0], {})
    if state.get("d") is None:
        return
    step, offset = state["d"] * state["t"], 0
    for parameter in parameters:
        size = parameter.numel() * (2 if parameter.is_complex() else 1)
        if id(parameter) in moved:
            update, factor = moved[id(parameter)]
            flat = (torch.view_as_real(update) if update.is_complex() else update).reshape(-1)
            step[offset : offset + size].add_(flat.to(step), alpha=factor)
        offset += size
    state["d"], state["t"] = step, 1.0


def sizes_of(entries: Sequence[ParameterEntry], layers: Iterable[str]) -> dict[str, int]:
    """The number of elements that each layer's weight has, or the parameter of that full name.

    Args:
        entries: The model's parameters.
        layers: The layers.

    Raises:
        StreamlensError: The model has nothing of that name.
    """
    weights = {entry.layer: entry.parameter.numel() for entry in entries if entry.role == "weight"}
    named = {entry.name: entry.parameter.numel() for entry in entries}
    sizes = {}
    for layer in layers:
        size = weights.get(layer, named.get(layer))
        if size is None:
            raise StreamlensError(f"the model has no weight of {layer!r}, whose size was to count")
        sizes[layer] = size
    return sizes
