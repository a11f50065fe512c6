"""`Freeze`: layers that have come to rest are trained no further."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from reactivex.disposable import Disposable

from streamlens.control._withholding import Withholding
from streamlens.control.controller import Controller
from streamlens.control.decision import Decision
from streamlens.errors import StreamlensError
from streamlens.operators._base import is_number, is_whole

if TYPE_CHECKING:
    from streamlens.frame import Frame

__all__ = ["Freeze"]

TOPIC: Final = "frozen.action"


class Freeze(Controller):
    """Freezes layers whose number in a stream says that they have come to rest, and thaws them.

    The stream gives one number a layer. Layers freeze where it has been at least `above` in `patience` frames
    on end, as a similarity to an earlier state is, or at most `below`, as an update is:

        # by the similarity of what layers make of a probe with what they made of it 500 steps ago
        lens.pipe(every(500), svcca(probe, reference="previous")).subscribe(Freeze(above=0.99))
        # by tiny updates
        lens.pipe(uw_ratio(), ema(0.9)).subscribe(Freeze(below=1e-5))

    A frozen layer gets no update at all: no gradient reaches its optimizer, which leaves the weights, their
    decay, momentum and moments as they are, and goes on from there once the layer is thawed. Parameters
    stay in their groups, so that schedulers and `optimizer.load_state_dict` see no difference. No gradient
    is computed for it either (`requires_grad` is False; put back when it thaws and when the subscription
    ends), but where that would break training: with `torch.distributed`, whose
    `DistributedDataParallel` waits for every gradient, and for the last parameters of an optimizer.
    Statistics that a forward pass keeps, as batch norm does, go on; a gradient checkpoint with
    `use_reentrant=True` gives no gradients where its input needs none: pass `keep_gradients=True`.

    A layer is whatever the stream names: a module with all modules in it, or a parameter by its full name.
    Names without trained parameters are passed over. A frame with a NaN among its layers, or without one that
    was there before and is not frozen, changes nothing. Where somebody else sets `requires_grad` of a frozen
    parameter, it reports so and stands back. It costs nothing between actions. Every action is a frame of
    `frozen.action`, 1 for a layer that was frozen and 0 for one that was thawed.

    Args:
        above: The least number of a layer at rest.
        below: The greatest number of a layer at rest; one of the two is given.
        patience: For how many frames on end.
        thaw: A number on the other side, at which a frozen layer has moved, for as many frames on end, and is
            trained again. An update of what is frozen is 0 and says nothing: use `thaw_after` there.
        thaw_after: After how many steps a frozen layer is trained again in any case.
        leave: How many of the stream's layers are trained on at least; those that would freeze last, by the
            order of the model, are left.
        at_once: How many layers one action freezes at most, the first ones of the model.
        keep_gradients: Go on computing gradients of frozen layers, for models in which a loss may depend on
            frozen layers only.
        dry_run: Only say what would be done.

    Raises:
        ValueError: Not one of `above` and `below` is given, or a number is out of its range.

    Reference:
        Freezing by similarity is the freeze training of Raghu, Gilmer, Yosinski, Sohl-Dickstein: SVCCA:
        Singular Vector Canonical Correlation Analysis for Deep Learning Dynamics and Interpretability,
        NeurIPS 2017.
    """

    __slots__ = (
        "_above",
        "_at_once",
        "_below",
        "_keep",
        "_leave",
        "_patience",
        "_thaw",
        "_thaw_after",
        "_withholding",
    )

    def __init__(
        self,
        *,
        above: float | None = None,
        below: float | None = None,
        patience: int = 3,
        thaw: float | None = None,
        thaw_after: int | None = None,
        leave: int = 1,
        at_once: int | None = None,
        keep_gradients: bool = False,
        dry_run: bool = False,
    ) -> None:
        super().__init__(dry_run=dry_run)
        if (above is None) == (below is None):
            raise ValueError(
                "Freeze takes one of above= (a similarity at which a layer is at rest, such as 0.99) and "
                "below= (an update ratio, such as 1e-5)"
            )
        for option, number in {"above": above, "below": below, "thaw": thaw}.items():
            if number is not None and not (is_number(number) and math.isfinite(number)):
                raise ValueError(f"Freeze({option}={number!r}): it is a finite number")
        if thaw is not None and not (thaw < above if above is not None else thaw > (below or 0.0)):
            limit = f"below above={above!r}" if above is not None else f"above below={below!r}"
            raise ValueError(f"Freeze(thaw={thaw!r}): a frozen layer has moved at a number {limit}")
        counts = {"patience": patience, "thaw_after": thaw_after, "leave": leave, "at_once": at_once}
        for option, count in counts.items():
            if count is not None and not (is_whole(count) and count >= 1):
                raise ValueError(f"Freeze({option}={count!r}): it is a whole number from 1 on")
        self._above, self._below, self._thaw = above, below, thaw
        self._patience, self._thaw_after = patience, thaw_after
        self._leave, self._at_once, self._keep = leave, at_once, keep_gradients
        self._withholding: Withholding | None = None
        self.frozen: dict[str, int] = {}
        self.without_gradient: list[str] = []
        self.counts: dict[str, int] = {}

    @property
    def action_topics(self) -> tuple[str, ...]:
        """The topic of its actions."""
        return (TOPIC,)

    def attached(self) -> None:
        """See `Controller.attached`.

        Raises:
            StreamlensError: It lacks the model, cannot freeze it, or another controller does.
        """
        if self.engine is None:
            raise StreamlensError(
                "Freeze acts on a model, and this stream comes from none: end a chain of the lens that "
                "observe(model) returned in it"
            )
        withholding = self._withholding = Withholding(self.engine, keep_gradients=self._keep)
        if why := withholding.obstacle():
            raise StreamlensError(f"Freeze cannot keep updates from layers: {why}")
        self.claim("freezing of layers", None)
        if not self.dry_run:
            self.hold(Disposable(withholding.release))
            withholding.freeze(self.frozen, self.without_gradient)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave; what was frozen is again."""
        super().load_state_dict(state)
        if self._withholding is not None and not self.dry_run and self.engine is not None:
            self._withholding.freeze(self.frozen, self.without_gradient)

    def propose(self, frame: Frame, noted: Any) -> Decision | None:
        """See `Controller.propose`.

        Raises:
            StreamlensError: The frame holds more than one number a layer, or none of a trained layer.
        """
        withholding = self._withholding
        assert withholding is not None
        if not self._may_act(withholding):
            return None
        numbers = {layer: float(value) for layer, value in frame.items() if value.numel() == 1}
        if len(numbers) != len(frame):
            raise StreamlensError(f"Freeze takes one number a layer, and {frame.topic!r} has more")
        numbers = {layer: number for layer, number in numbers.items() if withholding.trained(layer)}
        if not numbers:
            raise StreamlensError(f"Freeze: no layer of {frame.topic!r} has parameters that are trained")
        return self._decision(frame, self._resting(numbers), self._moved(numbers, frame.topic, frame.step))

    def _may_act(self, withholding: Withholding) -> bool:
        assert self.engine is not None
        why = withholding.obstacle()
        if not self.engine.updates.owners.known:
            why = "no optimizer is known that it could keep updates from: lens.step() says that there is none"
        if disturbed := withholding.disturbed():
            why = (
                f"it had frozen {min(disturbed)!r}, and somebody has set its requires_grad: such layers are "
                "trained again, and the others stay as they are"
            )
            for layer in [*self.frozen]:
                if disturbed.intersection(entry.name for entry in withholding.entries_of(layer)):
                    del self.frozen[layer]
            withholding.freeze(self.frozen, self.without_gradient)
        if why is not None:
            self.stand_back(why)
        return why is None

    def _resting(self, numbers: Mapping[str, float]) -> list[str]:
        """The layers to be frozen, in the order of the model."""
        training = [layer for layer in numbers if layer not in self.frozen]
        for layer in training:
            number = numbers[layer]
            rests = number >= self._above if self._above is not None else number <= (self._below or 0.0)
            self.counts[layer] = self.counts.get(layer, 0) + 1 if rests else 0
        resting = [layer for layer in training if self.counts[layer] >= self._patience]
        most = max(len(training) - self._leave, 0)
        return resting[: most if self._at_once is None else min(most, self._at_once)]

    def _moved(self, numbers: Mapping[str, float], topic: str, step: int) -> dict[str, str]:
        """The layers to be thawed, and why."""
        moved = {}
        for layer, since in self.frozen.items():
            number = numbers.get(layer)
            if number is not None and self._thaw is not None:
                moves = number <= self._thaw if self._above is not None else number >= self._thaw
                self.counts[layer] = self.counts.get(layer, 0) + 1 if moves else 0
            if self._thaw is not None and self.counts.get(layer, 0) >= self._patience:
                side = "at most" if self._above is not None else "at least"
                moved[layer] = f"{topic} has been {side} {self._thaw:g} for {_frames(self._patience)}"
            elif self._thaw_after is not None and step - since >= self._thaw_after:
                moved[layer] = f"{step - since} steps have passed"
        return moved

    def _decision(self, frame: Frame, resting: Sequence[str], moved: Mapping[str, str]) -> Decision | None:
        if not resting and not moved:
            return None
        side = f"at least {self._above:g}" if self._above is not None else f"at most {self._below:g}"
        rests = [f"{frame.topic} has been {side} for {_frames(self._patience)}"] if resting else []
        return _changing(resting, moved, "; ".join(dict.fromkeys([*rests, *moved.values()])))

    def thaw(self, *layers: str) -> None:
        """Train frozen layers again, all of them if none is named; on every rank.

        Args:
            layers: The layers.

        Raises:
            StreamlensError: It ends no chain, or a layer is not frozen.
        """
        engine = self.engine
        if engine is None:
            raise StreamlensError(f"{self.name} ends no chain: stream.subscribe(controller) first")
        for layer in layers:
            if layer not in self.frozen:
                frozen = ", ".join(map(repr, self.frozen)) or "none"
                raise StreamlensError(f"{self.name}.thaw({layer!r}): it is not frozen; these are: {frozen}")
        decision = _changing((), layers or tuple(self.frozen), "thaw() was called")
        if decision.layers:
            frame = engine.frame("thaw()", (), ())
            engine.post(lambda: self.conclude(frame, decision))

    def apply(self, decision: Decision) -> None:
        """Freeze and thaw."""
        withholding = self._withholding
        assert withholding is not None
        self.without_gradient = withholding.without_gradient(self.frozen)
        withholding.freeze(self.frozen, self.without_gradient)

    def decided(self, decision: Decision) -> None:
        """See `Controller.decided`."""
        for layer, frozen in zip(decision.layers, decision.new, strict=True):
            self.counts.pop(layer, None)
            if frozen:
                self.frozen[layer] = self.runtime.step
            else:
                self.frozen.pop(layer, None)


def _frames(count: int) -> str:
    return "one frame" if count == 1 else f"{count} frames"


def _changing(freezing: Sequence[str], thawing: Iterable[str], cause: str) -> Decision:
    thawing = tuple(thawing)
    old = (0.0,) * len(freezing) + (1.0,) * len(thawing)
    new = tuple(1.0 - value for value in old)
    deeds = [f"ended updates of {', '.join(freezing)}"] if freezing else []
    deeds += [f"resumed updates of {', '.join(thawing)}"] if thawing else []
    return Decision(TOPIC, old, new, cause, layers=(*freezing, *thawing), deed=" and ".join(deeds))
