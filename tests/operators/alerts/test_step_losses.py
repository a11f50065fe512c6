"""Rules on losses judge the mean over a step, from the one stream that those on each micro-step have."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame


class Run:
    """A model whose losses are given; each inner list is a step of so many micro-steps."""

    def __init__(self, *rules: sl.Operator) -> None:
        self.model = nn.Linear(1, 1)
        self.lens = sl.observe(self.model, on_error="raise")
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.0)
        self.watched = self.lens.watch_loss(self.loss)
        self.seen: list[Frame] = []
        for rule in rules:
            self.lens.pipe(rule).subscribe(self.seen.append)

    @staticmethod
    def loss(output: Tensor, value: float) -> Tensor:
        return output.sum() * 0 + value

    def micro_steps(self, values: Sequence[float]) -> None:
        for value in values:
            self.watched(self.model(torch.zeros(1, 1)), value).backward()

    def steps(self, steps: Sequence[Sequence[float]]) -> None:
        for values in steps:
            self.micro_steps(values)
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def alerts(self) -> list[tuple[str, int, str, float]]:
        return [(f.meta["rule"], f.step, f.meta["state"], float(f[f.layers[0]])) for f in self.seen]


STEADY = [[1.0, 3.0]] * 25


def test_a_spike_is_one_of_the_mean_over_the_step_and_not_of_a_micro_step() -> None:
    run = Run(sl.loss_spike())
    run.steps([*STEADY, [0.0, 4.0], [1.0, 9.0]])
    assert run.alerts == [("loss_spike", 26, "start", 5.0)]


def test_what_is_not_finite_is_told_of_a_single_micro_step() -> None:
    run = Run(sl.nonfinite_values(phases=("loss",)), sl.loss_spike())
    run.steps([*STEADY, [1.0, torch.inf], [1.0, 3.0], [1.0, 3.0]])
    assert [(rule, step, state) for rule, step, state, _ in run.alerts] == [
        ("nonfinite_values", 25, "start"),
        ("nonfinite_values", 27, "end"),
    ]


def test_alerts_are_those_of_losses_that_were_averaged_before() -> None:
    torch.manual_seed(0)
    steps = [(torch.rand(int(n)) * 2).tolist() for n in torch.randint(1, 4, (60,))]
    steps[40] = [1.0, 30.0, 2.0]
    run = Run(sl.health())
    whole: list[Frame] = []
    run.lens.pipe(sl.loss(), sl.per_step()).subscribe(whole.append)
    run.steps(steps)
    assert [float(frame[""]) for frame in whole] == pytest.approx([sum(v) / len(v) for v in steps])
    averaged = Run(sl.health())
    averaged.steps([[float(frame[""])] for frame in whole])
    found = [entry[:3] for entry in run.alerts]
    assert found == [entry[:3] for entry in averaged.alerts]
    assert ("loss_spike", 40, "start") in found


def test_a_step_that_was_saved_between_its_micro_steps_has_its_whole_mean() -> None:
    first = Run(sl.loss_spike())
    first.steps(STEADY)
    first.micro_steps([1.0])
    state = first.lens.state_dict()
    second = Run(sl.loss_spike())
    second.lens.load_state_dict(state)
    # The other half alone is a spike, and so would the first half not be.
    second.steps([[8.0]])
    assert second.alerts == [("loss_spike", 25, "start", 4.5)]
