"""Which cases of a test run in `make test`."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow_except(fast: Container[Any], cases: Iterable[Any]) -> list[Any]:
  """The cases as parameters of a test, all but `fast` marked as slow."""
  return [case if case in fast else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
  return case if isinstance(case, tuple) else (case,)
