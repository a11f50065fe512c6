"""Runs that are interrupted between any two micro-steps, saved, lost and loaded again."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.chain import ErrorReport
from streamlens.frame import Frame
from tests._runs import small_model

__all__ = ["CALM", "TROUBLES", "Chains", "Run"]

Chains = Mapping[str, Callable[[sl.Lens], Sequence[Any]]]
"""Chains by a label, made anew for each lens."""

TROUBLES: dict[str, Callable[[Tensor], Tensor]] = {
    "calm": lambda x: x,
    "huge": lambda x: x * 1e4,
    "nothing": torch.zeros_like,
    "broken": lambda x: x * float("nan"),
}
"""What happens to the inputs of a step."""

CALM = ("calm",)

_OF_THE_CLOCK = ("step_time", "examples_per_second")
"""Topics that no two runs share; and no update's time spans an interruption."""


class Run:
    """A run with everything that a checkpoint holds.

    Args:
        chains: What is subscribed.
        micro_steps: Forwards and backwards of one step.
        subscribe_after_loading: Whether chains are subscribed when the state is there already.
        troubles: What happens to the inputs, step by step, over and over.
    """

    def __init__(
        self,
        chains: Chains,
        micro_steps: int = 1,
        *,
        subscribe_after_loading: bool = False,
        troubles: Sequence[str] = CALM,
    ) -> None:
        self.chains = chains
        self.micro_steps = micro_steps
        self.subscribe_after_loading = subscribe_after_loading
        self.troubles = troubles
        self.frames: list[tuple[Any, ...]] = []
        self.reports: list[ErrorReport] = []
        self.done = 0
        self.start(None)

    def start(self, checkpoint: bytes | None) -> None:
        """Make everything anew, as a new process does, and load a checkpoint."""
        self.model = small_model()
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.lens = sl.observe(self.model, loss=self.criterion)
        self.lens.errors.subscribe(self.reports.append)
        if not self.subscribe_after_loading:
            self.subscribe()
        if checkpoint is not None:
            saved = torch.load(io.BytesIO(checkpoint))
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for name, parameter in self.model.named_parameters():
                parameter.grad = saved["gradients"][name]
            self.lens.load_state_dict(saved["lens"])
        if self.subscribe_after_loading:
            self.subscribe()

    def subscribe(self) -> None:
        """Subscribe all chains; what they give goes to `frames`."""
        self.recorders: list[sl.FlightRecorder] = []
        for label, make in self.chains.items():
            chain = make(self.lens)

            def note(frame: Frame | sl.AlignedFrame, label: str = label) -> None:
                if isinstance(frame, sl.AlignedFrame):
                    self.frames += [(label, *_told(part)) for part in frame.frames]
                else:
                    self.frames.append((label, *_told(frame)))

            self.lens.pipe(*chain).subscribe(note, name=label)
            self.recorders += [part for part in chain if isinstance(part, sl.FlightRecorder)]

    def interrupt(self) -> None:
        """Save, lose everything, load."""
        file = io.BytesIO()
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "gradients": gradients,
                "lens": self.lens.state_dict(),
            },
            file,
        )
        before = len(self.frames)
        self.lens.close()
        # What an interrupted process would still give at its end is not part of its run.
        del self.frames[before:]
        self.start(file.getvalue())

    def go_on(self, micro_steps: int, epoch: int) -> None:
        """Train; an epoch ends after every `epoch` steps."""
        for _ in range(micro_steps):
            data = torch.Generator().manual_seed(self.done)
            trouble = TROUBLES[self.troubles[self.done // self.micro_steps % len(self.troubles)]]
            x = trouble(torch.randn(4, 4, generator=data))
            y = torch.randint(0, 3, (4,), generator=data)
            if self.done % self.micro_steps == 0:
                self.optimizer.zero_grad()
            (self.criterion(self.model(x), y) / self.micro_steps).backward()
            self.done += 1
            if self.done % self.micro_steps == 0:
                # Weights outlive the trouble.
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.nan_to_num_()
                self.optimizer.step()
                if self.done // self.micro_steps % epoch == 0:
                    self.lens.epoch_finished()

    def told(self) -> dict[str, list[tuple[Any, ...]]]:
        """What each chain gave."""
        given: dict[str, list[tuple[Any, ...]]] = {label: [] for label in self.chains}
        for label, *rest in self.frames:
            if rest[0] not in _OF_THE_CLOCK:
                given[label].append(tuple(rest))
        return given


def _told(frame: Frame) -> tuple[Any, ...]:
    """A frame as something to compare: to the last bit, and NaN is NaN."""
    values = {layer: repr(_dense(value).tolist()) for layer, value in frame.items()}
    meta = {key: repr(value) for key, value in frame.meta.items()}
    return (frame.topic, frame.step, frame.epoch, frame.micro_step, frame.layers, values, meta)


def _dense(value: Tensor) -> Tensor:
    return value.to_dense() if value.layout is not torch.strided else value
