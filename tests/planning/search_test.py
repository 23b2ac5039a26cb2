"""Tests of `declip_jax.planning.search`."""

import math

import pytest

from declip_jax.planning.search import search_largest


@pytest.mark.parametrize(
  ("first", "unit", "slope", "base", "want"),
  [
    (64, 1, 1.0, 100.0, 900),
    (64, 8, 1.0, 100.0, 896),
    (2000, 1, 1.0, 100.0, 900),
    (7, 7, 1.5, 40.0, 112),
    (64, 1, 0, 9, 1024),
  ],
)
def test_search_finds_the_largest_in_three_compilations(first, unit, slope, base, want):
  compiled = []

  def needed_with(pairs: int) -> float:
    compiled.append(pairs)
    return base + slope * pairs

  tried = search_largest(needed_with, 1000.0, {first: base + slope * first}, unit)
  assert max(pairs for pairs, needed in tried.items() if needed <= 1000) == want
  assert len(compiled) <= 3
  assert not any(pairs % unit for pairs in compiled)


def test_search_halves_the_batch_while_the_need_is_unknown():
  tried = search_largest(lambda pairs: 500.0 if pairs <= 9 else math.inf, 1000.0, {64: math.inf}, 1)
  assert tried == {64: math.inf, 32: math.inf, 16: math.inf, 8: 500.0}
  assert search_largest(lambda _: math.inf, 1.0, {1: math.inf}, 1) == {1: math.inf, 2: math.inf}
