"""Failures inside an operator are failures of the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from streamlens.runtime import default_runtime

# Time on a shared machine says nothing; what an example costs is looked at in the benchmarks.
settings.register_profile("operators", deadline=None, max_examples=60)
settings.load_profile("operators")


@pytest.fixture(autouse=True, scope="module")
def _errors_are_raised() -> Iterator[None]:
    runtime = default_runtime()
    before = runtime.on_error
    runtime.on_error = "raise"
    yield
    runtime.on_error = before
