"""Tests of `declip_jax.models.batch_norm`: one group, several groups, and PyTorch's running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from declip_jax.models.batch_norm import BatchNorm


def run(groups, x, affine=True):
  module, x = BatchNorm(groups=groups, affine=affine), jnp.asarray(x)
  variables = module.init(jax.random.key(0), x, True)
  y, new = jax.jit(lambda x: module.apply(variables, x, True, mutable=["batch_stats"]))(x)
  return variables, np.asarray(y), new["batch_stats"]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_each_group_has_its_own_statistics(groups):
  x = np.random.default_rng(0).normal(2.0, 3.0, size=(8, 5)).astype(np.float32)
  _, y, after = run(groups, x)
  parts = np.split(x, groups)
  expected = np.concatenate([(part - part.mean(0)) / np.sqrt(part.var(0) + 1e-5) for part in parts])
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(after["mean"], 0.1 * np.mean([part.mean(0) for part in parts], axis=0), rtol=1e-5)
  unbiased = np.mean([part.var(0, ddof=1) for part in parts], axis=0)
  np.testing.assert_allclose(after["var"], 0.9 + 0.1 * unbiased, rtol=1e-5)


def test_groups_are_independent_and_the_whole_batch_is_not():
  x = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
  changed = x.copy()
  changed[4:] += 5
  for groups, same in ((2, True), (1, False)):
    assert np.allclose(run(groups, x)[1][:4], run(groups, changed)[1][:4], atol=1e-6) == same


def test_without_gain_and_bias_there_are_no_parameters():
  x = jnp.ones((4, 3)) * jnp.arange(4.0)[:, None]
  variables, y, _ = run(1, x, affine=False)
  assert "params" not in variables
  np.testing.assert_allclose(y.std(axis=0), 1, rtol=1e-4)


def test_groups_that_do_not_divide_the_batch_are_rejected():
  with pytest.raises(ValueError, match="norm_groups=3 .*does not divide the batch of 8"):
    run(3, jnp.ones((8, 2)))
