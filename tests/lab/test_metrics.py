"""Metrics as people write them on the command line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import streamlens as sl
from streamlens.lab.metrics import parse_metric


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("norm(weights)", sl.norm("weights")),
        (" norm ( 'weights' , order = 1 ) ", sl.norm("weights", order=1)),
        ("norm(topic=weights, order=3.5)", sl.norm("weights", order=3.5)),
        ("quantiles(q=[0.1, 0.9], topic=weights)", sl.quantiles("weights", q=[0.1, 0.9])),
        ("var(weights, unbiased=False)", sl.var("weights", unbiased=False)),
        ("histogram(weights, range=(-1, 1))", sl.histogram("weights", range=(-1, 1))),
        ("uw_ratio", sl.uw_ratio()),
        ("topic(G/weights.norm2)", sl.topic("G/weights.norm2")),
    ],
)
def test_what_is_written_is_what_is_computed(text: str, same: sl.Operator) -> None:
    model = nn.Linear(2, 2)
    with sl.observe(model, emits=["G/weights.norm2"]) as lens:
        found, expected = parse_metric(text).of(lens, lens), lens.pipe(same)
        assert isinstance(found, sl.Stream)
        assert isinstance(expected, sl.Stream)
        assert found.plan_text.split(" | <")[0] == expected.plan_text


def test_operators_are_chained_in_order() -> None:
    model = nn.Linear(2, 2)
    with sl.observe(model) as lens:
        stream = parse_metric("norm(weights) | ema(0.5) | window(10, reduce='max')").of(lens, lens)
        assert isinstance(stream, sl.Stream)
        assert "norm2 | ema(0.5) | window(10" in stream.plan_text


def test_what_an_operator_requires_and_nobody_can_write_is_provided() -> None:
    loss = nn.CrossEntropyLoss()
    provided = {"loss": loss, "batch": (torch.ones(1, 2), torch.zeros(1, dtype=torch.long))}
    metric = parse_metric("hessian_eigenvalues(k=2)", provided)
    assert metric.evaluates
    assert not parse_metric("norm(weights)", provided).evaluates
    with pytest.raises(ValueError, match="loss"):
        parse_metric("hessian_eigenvalues(k=2)")


def test_a_text_of_no_end_is_refused() -> None:
    for text in ("(" * 5000, "norm | " * 500 + "norm", "norm(" + "-" * 900 + "1)"):
        with pytest.raises(ValueError, match="metric"):
            parse_metric(text)
