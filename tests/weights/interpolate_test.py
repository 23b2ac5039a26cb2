"""Tests of `declip_jax.weights.interpolate`."""

import numpy as np
import pytest

from declip_jax.weights.interpolate import interpolate


def test_the_ends_are_exact_and_the_middle_is_the_mean() -> None:
  start, end = ({"a": np.float32([0.1, 0.2]), "b": {"c": np.float32(x)}} for x in (0.3, 0.7))
  end["a"] = np.float32([1.1, -0.2])
  assert interpolate(start, end, 0) is start
  assert interpolate(start, end, 1) is end
  found = interpolate(start, end, 0.25)
  np.testing.assert_allclose(found["a"], [0.35, 0.1], rtol=1e-6)
  np.testing.assert_allclose(found["b"]["c"], 0.4, rtol=1e-6)


def test_types_are_kept_and_integers_are_not_mixed() -> None:
  start = {"steps": np.int32(3), "scale": np.float32(1), "half": np.ones(2, np.float16)}
  found = interpolate(start, {"steps": np.int32(4), "scale": np.float64(2), "half": np.zeros(2, np.float16)}, 0.5)
  assert {name: value.dtype.name for name, value in found.items()} == {
    "steps": "int32",
    "scale": "float32",
    "half": "float16",
  }
  assert (found["steps"], found["scale"]) == (4, 1.5)


def test_weights_of_other_models_are_rejected() -> None:
  start = {"head": np.zeros((3, 4)), "tower": np.zeros(2)}
  with pytest.raises(ValueError, match=r"differ in head, \(3, 4\) and \(3, 5\)"):
    interpolate(start, {**start, "head": np.zeros((3, 5))}, 0.5)
  with pytest.raises(ValueError, match=r"differ in tower, \(2,\) and absent"):
    interpolate(start, {"head": start["head"]}, 1)
