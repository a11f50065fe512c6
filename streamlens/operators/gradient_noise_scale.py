"""`gradient_noise_scale`: the batch size beyond which a larger one stops paying."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.chain import Mark, MarkKind
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.lens import Lens
from streamlens.nodes import Emitted, stateful
from streamlens.operators._base import OperatorNode, checked_source, is_number, is_whole, relabelled
from streamlens.operators._merge import merged
from streamlens.operators._tensors import check_whole, copies, dense, dots, tensors_of
from streamlens.operators.selection import topic as select
from streamlens.stream import Operator, Stream

__all__ = ["gradient_noise_scale"]

_LOCAL: Final = "raw_gradients"
_REDUCED: Final = "parameter_gradients"
_INPUT: Final = "input_data"


def gradient_noise_scale(
    decay: float = 0.99, *, batch_size: int | None = None, ranks: int | None = None
) -> Operator:
    """The simple gradient noise scale, in samples: B_simple = tr(Sigma) / |G|^2 (McCandlish et al. 2018).

    Sigma is the covariance of one sample's gradient, G the true gradient. A batch much smaller than this
    wastes steps, one much larger wastes samples. Both are estimated without bias from the norms of
    gradients of a small and a large batch (appendix A.1),

        |G|^2 ~ (B_big |G_big|^2 - B_small |G_small|^2) / (B_big - B_small)
        S     ~ (|G_small|^2 - |G_big|^2) / (1 / B_small - 1 / B_big),

    smoothed apart over steps by equal moving averages, and divided then (their bias corrections are equal
    and cancel). The large batch is a step's; the small ones are

    - its micro-batches, under gradient accumulation: two or more a step. Their gradients are the differences
      of the accumulated `raw_gradients`, which start from none at each step. Sizes may differ.
    - or, with `ranks=R`, the part of a batch that each of R data-parallel ranks has: this rank's own
      `raw_gradients` against the reduced `parameter_gradients`. Each rank's estimate is unbiased for itself.
      Gradients must be neither clipped nor scaled.

    Input: those raw gradients, of any shapes, and `input_data` unless `batch_size` is given. The unit
    is samples.
    The result is topic `gradient_noise_scale` of the whole model (layer `""`), and topic
    `gradient_noise_scale.layers` of each parameter by itself, a frame of each a step, in samples. A
    micro-batch counts as many samples as `input_data` has in its first dimension, or `batch_size`. Whether
    losses are divided by the number of micro-batches makes no difference. It is NaN while the estimate of
    |G|^2 is not positive, as it may be where noise is all there is. An estimate that is not finite is counted
    and left out of the averages. A cadence chooses the steps that are estimated. Under a gradient scaler,
    steps before and after a change of its scale are averaged with unequal weights.

    The cost is one copy of all gradients kept, and four passes over them a micro-step; nothing waits
    for a GPU.

    Args:
        decay: Of the moving averages, in [0, 1).
        batch_size: Samples in a micro-batch (on one rank); from the input's first dimension unless given.
        ranks: How many data-parallel ranks there are; between micro-batches unless given.

    Returns:
        The operator.

    Raises:
        ValueError: A decay outside [0, 1), a batch size below 1, or fewer than 2 ranks.
        StreamlensError: When applied: the stream carries numbers and not tensors. While training, reported
            once: there is only one micro-batch a step, or the batch size is not known.
    """
    number = is_number(decay)
    if not number or not 0 <= decay < 1:
        raise ValueError(f"gradient_noise_scale({decay!r}): a decay from 0 to below 1, such as 0.99")
    for name, value, least in (("batch_size", batch_size, 1), ("ranks", ranks, 2)):
        if value is not None and (not is_whole(value) or value < least):
            raise ValueError(f"gradient_noise_scale({name}={value!r}): a number from {least} on")
    plan = f"gradient_noise_scale({decay:g}"
    plan += "" if batch_size is None else f", batch_size={batch_size}"
    plan += ")" if ranks is None else f", ranks={ranks})"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = _inputs(source, batch_size is None, ranks is not None)
        return stateful(
            stream,
            lambda: _Noise(stream, float(decay), batch_size, ranks),
            plan,
            marks=True,
            kind=Kind.STEP,
        )

    return apply


def _inputs(source: Observable[Frame], sizes: bool, ranks: bool) -> Stream:
    if not isinstance(source, Lens):
        return tensors_of(source, None, "gradient_noise_scale")
    gradients = [_LOCAL, *([_REDUCED] if ranks else [])]
    streams = [tensors_of(source, name, "gradient_noise_scale") for name in gradients]
    if sizes:
        # A selection of layers is of the gradients: the batch belongs to none.
        view = replace(source.view, topics=(), selectors=())
        streams.append(checked_source(select(_INPUT)(Lens(source.source, source.session, view))))
    return merged(streams[0], streams, source.plan)


@dataclass
class _Step:
    """What has come of one step."""

    last: Frame
    """The newest frame: where in the run this is; its values are not read."""
    accumulated: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    """Sums over micro-batches of the squared norms of their gradients."""
    sizes: list[float] = field(default_factory=list)
    count: int = 0


class _Noise(OperatorNode):
    def __init__(self, stream: Stream, decay: float, batch_size: int | None, ranks: int | None) -> None:
        super().__init__(stream.runtime)
        self._of_a_run = stream.lens is not None
        self._decay = decay
        self._batch_size = batch_size
        self._ranks = ranks
        self._size: float | None = None
        self._step: _Step | None = None
        self._averages: dict[str, Tensor] = {}
        """By layer, and for the whole model under "": smoothed S and |G|^2."""
        self._told: set[str] = set()

    def on_frame(self, frame: Frame) -> Emitted:
        out = list(self._close()) if self._step is not None and frame.step > self._step.last.step else []
        if frame.topic == _INPUT:
            if frame.layers and frame.layers[0] == "" and frame.values[0].ndim:
                self._size = float(frame.values[0].shape[0])
        elif frame.topic == _LOCAL and frame.layers:
            check_whole(frame, "gradient_noise_scale")
            self._take(frame)
        elif frame.topic == _REDUCED and self._ranks is not None and self._step is not None:
            out += self._of_ranks(frame, self._step)
        return out

    def _take(self, frame: Frame) -> None:
        step = self._step
        if step is None:
            step = self._step = _Step(frame)
        step.last = relabelled(frame, frame.topic, torch.empty(0), layers=())
        size = self._batch_size or self._size
        if size is None:
            self._step = None
            self._tell(
                "gradient_noise_scale() does not know the size of a micro-batch: pass batch_size=, or let "
                "the frames of 'input_data' come on the stream too"
            )
            return
        step.sizes.append(float(size))
        step.count += 1
        now = {name: dense(gradient) for name, gradient in frame.items()}
        own = [x - step.accumulated[n] if n in step.accumulated else x for n, x in now.items()]
        for name, square in zip(now, dots(own, own), strict=True):
            before = step.squares.get(name)
            step.squares[name] = square if before is None else before + square
        for name, gradient in now.items():
            if name in step.accumulated:
                step.accumulated[name].copy_(gradient)
            else:
                step.accumulated[name] = gradient.clone()

    def on_mark(self, mark: Mark) -> Emitted:
        """An update: the step's micro-batches are complete."""
        if self._ranks is not None or mark.kind is MarkKind.EPOCH or self._step is None:
            return None
        return self._close() if mark.step >= self._step.last.step else None

    def on_completed(self) -> Emitted:
        """The end of a plain stream closes its last step; a run's open step never got its update."""
        return None if self._of_a_run else self._close()

    def _close(self) -> list[Frame]:
        step, self._step = self._step, None
        if step is None or self._ranks is not None:
            return []
        if step.count < 2:
            self._tell(
                "gradient_noise_scale() compares the gradients of a step's micro-batches, and this run has "
                "one a step: accumulate gradients over two or more backward passes before each "
                "optimizer.step(), or on data-parallel ranks pass ranks=torch.distributed.get_world_size()"
            )
            return []
        layers = tuple(step.accumulated)
        held = [step.accumulated[name] for name in layers]
        n = step.count
        small = torch.stack([step.squares[name] for name in layers]) / n
        return self._estimate(step.last, layers, small, dots(held, held) / n**2, step.sizes, n)

    def _of_ranks(self, frame: Frame, step: _Step) -> list[Frame]:
        """A step's own gradients against the reduced ones."""
        assert self._ranks is not None
        pairs = [(name, value) for name, value in frame.items() if name in step.accumulated]
        if not pairs or frame.step != step.last.step:
            return []
        held = [step.accumulated[name] for name, _ in pairs]
        reduced = [dense(value) for _, value in pairs]
        layers = tuple(name for name, _ in pairs)
        samples = [sum(step.sizes)]
        self._step = None
        return self._estimate(frame, layers, dots(held, held), dots(reduced, reduced), samples, self._ranks)

    def _estimate(
        self,
        at: Frame,
        layers: tuple[str, ...],
        small: Tensor,
        big: Tensor,
        sizes: Sequence[float],
        parts: int,
    ) -> list[Frame]:
        """The estimators for `parts` small batches of these sizes, whose mean is the big one."""
        small, big = (torch.cat([x.sum()[None], x]) for x in (small, big))
        # On average |g|^2 is |G|^2 + S / b for a batch of b samples, and |G|^2 + S mean(1/b) / parts for the
        # mean of several.
        share = sum(1 / size for size in sizes) / len(sizes)
        noise = (small - big) / (share * (1 - 1 / parts))
        signal = big - noise * share / parts
        both = torch.stack([noise, signal], 1)
        finite = both.isfinite().all(1)
        self.count_finite(finite)
        rows: list[Tensor] = []
        for i, name in enumerate(("", *layers)):
            before = self._averages.get(name)
            if before is None:
                before = torch.zeros_like(both[i])
            after = before.to(both.device) * self._decay + both[i] * (1 - self._decay)
            self._averages[name] = torch.where(finite[i], after, before.to(both.device))
            rows.append(self._averages[name])
        s, g = torch.stack(rows).unbind(1)
        values = torch.where(g > 0, s / g, math.nan).float()
        whole = relabelled(at, "gradient_noise_scale", values[:1], layers=("",)).replace(kind=Kind.STEP)
        each = relabelled(at, "gradient_noise_scale.layers", values[1:], layers=layers)
        return [whole, each.replace(kind=Kind.STEP)]

    def _tell(self, message: str) -> None:
        """Raise once: the remedy is not in the next step."""
        if message not in self._told:
            self._told.add(message)
            raise StreamlensError(message)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"averages": dict(self._averages), "size": self._size, "step": None}
        if (step := self._step) is not None:
            last = step.last
            state["step"] = {
                "at": [last.step, last.epoch, last.micro_step, last.source],
                "accumulated": copies(step.accumulated),
                "squares": dict(step.squares),
                "sizes": list(step.sizes),
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averages = dict(state["averages"])
        self._size = state["size"]
        self._step = None
        if (saved := state["step"]) is not None:
            step, epoch, micro_step, source = saved["at"]
            kind = Kind.MICRO_STEP
            last = Frame(
                _LOCAL, step, (), torch.empty(0), epoch=epoch, micro_step=micro_step, kind=kind, source=source
            )
            sizes = list(saved["sizes"])
            self._step = _Step(last, copies(saved["accumulated"]), dict(saved["squares"]), sizes, len(sizes))
