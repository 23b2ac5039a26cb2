"""Tests that violated annotations and implicit broadcasting are errors while tests run."""

import contracts
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from declip_jax.objectives.momentum import momentum_at
from declip_jax.training import optim
from declip_jax.unit_norm import unit_norm

pytestmark = pytest.mark.skipif(not contracts.WANTED, reason="CONTRACTS=0")


def test_a_wrong_shape_dtype_or_type_is_an_error() -> None:
  with pytest.raises(TypeCheckError, match="step"):
    momentum_at(jnp.zeros(3, jnp.int32), 10, 0.9)
  with pytest.raises(TypeCheckError, match="step"):
    momentum_at(jnp.float32(1), 10, 0.9)
  with pytest.raises(TypeCheckError, match="field"):
    optim.check_name(3, "adamw", ["adamw"])


def test_numpy_arrays_are_not_jax_arrays() -> None:
  with pytest.raises(TypeCheckError, match="numpy"):
    unit_norm(np.ones((2, 3), np.float32))


def test_implicit_broadcasting_is_an_error() -> None:
  with pytest.raises(ValueError, match="rank_promotion"):
    jnp.ones((2, 3)) + jnp.ones(3)


def test_an_int_is_a_float() -> None:
  assert float(momentum_at(jnp.int32(10), 10, 0)) == 1
