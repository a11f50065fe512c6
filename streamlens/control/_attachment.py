"""`ControllerAttachment`: one chain's frames on their way into a controller, a fixed lag old."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from reactivex.abc import ObserverBase
from torch import Tensor

from streamlens.capture.engine import Engine
from streamlens.chain import Mark, MarkKind
from streamlens.frame import Frame, Kind

if TYPE_CHECKING:
    from streamlens.control.controller import Controller
    from streamlens.runtime import Runtime

__all__ = ["ControllerAttachment", "lagging"]


def lagging(frame: Frame) -> bool:
    """Whether a frame's values need a copy that is better not waited for at once."""
    values = (frame.values,) if isinstance(frame.values, Tensor) else frame.values
    return any(value.is_cuda for value in values)


class _Copied:
    """A frame whose values are being copied to the host, and what was noted when it came."""

    def __init__(self, frame: Frame, noted: Any) -> None:
        self.noted = noted
        self.lags = lagging(frame)
        self._event: torch.cuda.Event | None = None
        values = frame.values
        if isinstance(values, Tensor):
            self._frame = frame.replace(values=self._copy(values))
        else:
            self._frame = frame.replace(values=tuple(map(self._copy, values)))
        cuda = next((v for v in ((values,) if isinstance(values, Tensor) else values) if v.is_cuda), None)
        if cuda is not None:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(cuda.device))

    @staticmethod
    def _copy(value: Tensor) -> Tensor:
        if not value.is_cuda:
            return value.detach().clone()
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return host.copy_(value.detach(), non_blocking=True)

    def arrived(self) -> Frame:
        """The frame, once its copy is there."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._frame

    def state_dict(self) -> dict[str, Any]:
        """The frame, and what was noted, as plain containers and tensors."""
        frame = self.arrived()
        return {
            "topic": frame.topic,
            "step": frame.step,
            "epoch": frame.epoch,
            "micro_step": frame.micro_step,
            "layers": list(frame.layers),
            "values": frame.values.clone() if isinstance(frame.values, Tensor) else list(frame.values),
            "components": list(frame.components),
            "meta": dict(frame.meta),
            "kind": frame.kind.value,
            "source": frame.source,
            "noted": self.noted,
            "lags": self.lags,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Copied:
        """What `state_dict` was of."""
        saved = dict(state)
        noted, lags, kind = saved.pop("noted"), saved.pop("lags"), Kind(saved.pop("kind"))
        topic, step = saved.pop("topic"), saved.pop("step")
        layers, values = saved.pop("layers"), saved.pop("values")
        copied = cls(Frame(topic, step, layers, values, kind=kind, **saved), noted)
        copied.lags = lags
        return copied


class ControllerAttachment(ObserverBase[Frame]):
    """Receives the frames of one chain for a controller; its state goes with the chain's.

    What comes while a step is under way, as losses do, waits for its update: controllers act after it.

    Args:
        controller: Whose it is.
        runtime: The run.
    """

    skipped = 0

    def __init__(self, controller: Controller, runtime: Runtime) -> None:
        self._controller = controller
        self._runtime = runtime
        self._engine = runtime if isinstance(runtime, Engine) else None
        self._waiting: list[_Copied] = []
        self._on_its_way: _Copied | None = None
        self._marks = None if self._engine is None else runtime.on_mark(self._on_mark)
        self.plan = controller.name
        self.running = True

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know of it, for `explain()`."""
        held = self._controller.held
        found = [f"{held} frames were no input (NaN, infinite or without a layer)"] if held else []
        if self._controller.standing_back:
            found.append("stands back: somebody else steers the same")
        return (*found, "dry run") if self._controller.dry_run else tuple(found)

    def on_next(self, frame: Frame) -> None:
        """Receive a frame of the chain."""
        if self._controller.takes_frames:
            self.receive(frame)

    def receive(self, frame: Frame) -> None:
        """Receive an input; the controller acts once everything of this burst is delivered."""
        noted = self._controller.note()
        if self._mid_step:
            self._waiting.append(_Copied(frame, noted))
        elif lagging(frame):
            self._pass_on(_Copied(frame, noted))
        else:
            self._hand(frame, noted)

    @property
    def _mid_step(self) -> bool:
        """Whether the open step has begun, and its update is still to come."""
        clock = None if self._engine is None else self._engine.clock
        return clock is not None and clock.counted and not clock.updated

    def _on_mark(self, mark: Mark) -> None:
        if self._waiting and mark.kind is not MarkKind.EPOCH:
            waiting, self._waiting = self._waiting, []
            for copied in waiting:
                self._pass_on(copied)

    def _pass_on(self, copied: _Copied) -> None:
        """Hand on a frame, or the one before if its copy needs a step's time."""
        if copied.lags:
            before, self._on_its_way = self._on_its_way, copied
            if before is None:
                return
            copied = before
        self._hand(copied.arrived(), copied.noted)

    def _hand(self, frame: Frame, noted: Any) -> None:
        self._runtime.post(lambda: self._controller.take(frame, noted) if self.running else None)

    def on_error(self, error: Exception) -> None:
        """The chain has ended with an error."""
        self.dispose()

    def on_completed(self) -> None:
        """The chain has ended."""
        self.dispose()

    def dispose(self) -> None:
        """Let go of the controller."""
        if self.running:
            self.running = False
            if self._marks is not None:
                self._marks.dispose()
            self._controller.detach()

    def state_dict(self) -> dict[str, Any]:
        """The controller's state, and the frames that it has yet to see."""
        state: dict[str, Any] = {"controller": self._controller.state_dict()}
        if self._on_its_way is not None:
            state["on_its_way"] = self._on_its_way.state_dict()
        if self._waiting:
            state["waiting"] = [copied.state_dict() for copied in self._waiting]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._controller.load_state_dict(state["controller"])
        self._on_its_way = _Copied.of(state["on_its_way"]) if "on_its_way" in state else None
        self._waiting = [_Copied.of(saved) for saved in state.get("waiting", ())]
