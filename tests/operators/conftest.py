"""Failures inside an operator are failures of the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from streamlens.runtime import default_runtime


@pytest.fixture(autouse=True, scope="module")
def _errors_are_raised() -> Iterator[None]:
    runtime = default_runtime()
    before = runtime.on_error
    runtime.on_error = "raise"
    yield
    runtime.on_error = before
