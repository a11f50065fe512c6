"""`GradientController`: acts on gradients, before an update consumes them."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
import torch.distributed as dist
from reactivex.disposable import Disposable
from torch import Tensor
from torch.optim import Optimizer

from streamlens.capture.sharded import WHOLE
from streamlens.control._rates import check_optimizer
from streamlens.control.controller import Controller
from streamlens.control.decision import Decision
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.reductions import Statistic, summarise
from streamlens.reductions.elements import double_where_known
from streamlens.topics import topic_spec

if TYPE_CHECKING:
    from streamlens.capture.model import ModelIndex, ParameterEntry

__all__ = ["GradientController"]

_SQUARES: Final = Statistic("sum_of_squares")
_LONGEST: Final = 1 << 18
"""Elements whose squares are summed in single precision at most."""
_LEAST: Final = 1e-15
"""The least norm whose squares single precision holds."""


class GradientController(Controller):
    """A controller that scales gradients as they stand when the update is called.

    Its input is the gradients of the layers that its chain selects, `lens.pipe(layers("features.*"), ...)`,
    all of them without that, at every update: the frames of that chain are left aside, and with its
    subscription it ends. It acts on the device, without lag and without
    waiting for it; what `weight_gradients` shows is what remains after it. Under a closure it acts when
    the first evaluation in a step has returned. An update that a GradScaler skips is none.

    Subclasses write `scales`. What they hand to `record` there comes back to `propose` as a frame, with
    values on the host, a fixed lag later on a device, and what `propose` makes of it is the action that is
    announced, under the step at which it was done. With `dry_run=True` the scales are not applied. Across
    ranks rank 0's scales are everybody's.

    Args:
        optimizer: Before whose updates it acts; those of all optimizers of the observed model if None.
        dry_run: Only say what would be done.

    Raises:
        TypeError: `optimizer` is none.
    """

    __slots__ = ("_chosen", "_optimizer", "_record")

    takes_frames: ClassVar[bool] = False
    needs_finite: ClassVar[bool] = False

    def __init__(self, optimizer: Optimizer | None = None, *, dry_run: bool = False) -> None:
        super().__init__(dry_run=dry_run)
        check_optimizer(self.name, optimizer)
        self._optimizer = optimizer
        self._record: Frame | None = None
        self._chosen: tuple[ModelIndex, frozenset[str] | None] | None = None

    @abstractmethod
    def scales(self, gradients: Mapping[str, Tensor], optimizer: Optimizer) -> Mapping[str, Tensor]:
        """By how much to multiply gradients.

        Args:
            gradients: What the update is about to consume, by full parameter name, on the device; not to
                be changed, nor kept.
            optimizer: Whose update it is.

        Returns:
            A tensor with one element for each parameter whose gradient is to be scaled.
        """

    def propose(self, frame: Frame, noted: Any) -> Decision | None:
        """What was done, from the numbers that were recorded."""
        return None

    def apply(self, decision: Decision) -> None:
        """It has been done, before the update."""

    def moment(self, frame: Frame) -> tuple[int, int]:
        """The step at which it acted, also where the numbers come later."""
        return frame.step, frame.epoch

    def record(self, layers: Sequence[str], values: Tensor) -> None:
        """Have `propose` look at numbers of this update, once they are on the host.

        Args:
            layers: What they are of.
            values: The numbers, a row for each layer, on any device.
        """
        engine = self.engine
        assert engine is not None
        self._record = engine.frame(self.name, tuple(layers), values, kind=Kind.EVENT)

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """The 2-norm of each tensor, in double precision where the device has it."""
        if tensors and all(map(_small, tensors)):
            # What is read fast costs more to ask for than to read: one call for all of them.
            norms = torch.stack(torch._foreach_norm(list(tensors), 2)).double()
            if bool((norms.isfinite() & (norms > _LEAST)).all()):
                return norms
        return summarise(tensors, (_SQUARES,))[0][_SQUARES].sqrt()

    def gradient_norms(self, gradients: Sequence[Tensor], optimizer: Optimizer) -> Tensor:
        """The 2-norm of each gradient as it will be used: a fused optimizer divides by GradScaler's scale."""
        norms = self.norms(gradients)
        scale = getattr(optimizer, "grad_scale", None)
        return norms / scale.to(norms) if isinstance(scale, Tensor) else norms

    def attached(self) -> None:
        """See `Controller.attached`.

        Raises:
            StreamlensError: The chain does not come from a lens, this process holds only shards of the
                gradients, or another controller acts on them.
        """
        engine = self.engine
        if engine is None:
            raise StreamlensError(
                f"{self.name} acts on gradients, and a stream without a model has none: end a chain of the "
                "lens that observe(model) returned in it"
            )
        own = None if self._optimizer is None else _owned(self._optimizer)
        self._chosen = None
        entries = self._selected(e for e in engine.index.entries if own is None or id(e.parameter) in own)
        if objection := self._objection(entries):
            raise StreamlensError(objection)
        self.claim("gradients", self._optimizer)
        acting = engine.updates.interventions.acting
        acting.append(self._intervene)

        def remove() -> None:
            with contextlib.suppress(ValueError):
                acting.remove(self._intervene)

        self.hold(Disposable(remove))

    def _selected(self, entries: Iterable[ParameterEntry]) -> list[ParameterEntry]:
        """Those parameters that are of layers which its chain selects."""
        assert self.engine is not None
        index, spec = self.engine.index, topic_spec("parameters")
        assert spec is not None
        if self._chosen is None or self._chosen[0] is not index:
            self._chosen = index, index.resolve(spec, self._links.selectors)
        names = self._chosen[1]
        return [entry for entry in entries if names is None or entry.name in names]

    def _objection(self, entries: Sequence[ParameterEntry]) -> str | None:
        """Why it cannot act on the gradients of some parameters: their norms are those of whole tensors."""
        shards = [entry.name for entry in entries if entry.part != WHOLE]
        if not shards:
            return None
        return (
            f"{self.name} needs whole gradients, and of {shards[0]!r} this process holds a shard: use the "
            "means of what shards it (torch.nn.utils.clip_grad_norm_ takes DTensors), or steer the rate with "
            "RatioLR"
        )

    def _intervene(self, optimizer: Optimizer, entries: Sequence[ParameterEntry]) -> None:
        if self._optimizer not in (None, optimizer):
            return
        info = None if self.engine is None else self.engine.updates.owners.get(optimizer)
        if info is not None and info.stands_in:
            self.stand_back(
                f"{type(optimizer).__name__} owns copies of the parameters, whose gradients are not known: "
                "observe(model, owners={name: tensor}) says which tensor stands for which parameter"
            )
        selected = self._selected(entries)
        if not self.standing_back and (objection := self._objection(selected)):
            # Sharded since the subscription.
            self.stand_back(objection)
        gradients = {e.name: g.detach() for e in selected if (g := e.gradient) is not None}
        factors: Mapping[str, Tensor] = {}
        with torch.no_grad():
            if gradients and not self.standing_back:
                factors = self.runtime.attempt(f"{self.name}.scales", self.scales, gradients, optimizer) or {}
            if self.several_ranks:
                # Also where there is nothing to scale: every rank has to be there.
                factors = self._same_on_all(factors, entries)
            if not self.dry_run:
                _scale([(gradients[name], f) for name, f in factors.items() if name in gradients])
        record, self._record = self._record, None
        attachment = self._links.attachment
        if record is not None and attachment is not None:
            attachment.receive(record)

    def _same_on_all(
        self, factors: Mapping[str, Tensor], entries: Sequence[ParameterEntry]
    ) -> Mapping[str, Tensor]:
        device = entries[0].tensor.device
        row = [factors.get(entry.name) for entry in entries]
        one = torch.ones((), dtype=double_where_known(device), device=device)
        values = torch.stack([one if f is None else f.to(one).reshape(()) for f in row])
        if values.is_cpu:
            answers = self.gathered(values.tolist())
            if not answers:
                return {}
            values = values.new_tensor(answers[0])
        else:
            # In the group of training, whose backend need not wait for the device.
            dist.broadcast(values, src=0)
        return {entry.name: value for entry, value in zip(entries, values, strict=True)}


def _small(tensor: Tensor) -> bool:
    return (
        tensor.is_cpu
        and tensor.dtype == torch.float32
        and tensor.layout is torch.strided
        and 0 < tensor.numel() <= _LONGEST
    )


def _owned(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _scale(scaled: Sequence[tuple[Tensor, Tensor]]) -> None:
    if not scaled:
        return
    # Multiplied itself, a sparse tensor would get values that whoever else refers to it does not see.
    elements = [g._values() if g.layout is torch.sparse_coo else g for g, _ in scaled]
    torch._foreach_mul_(
        elements, [factor.to(e.device) for e, (_, factor) in zip(elements, scaled, strict=True)]
    )
