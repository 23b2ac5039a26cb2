"""Tests of `declip_jax.evals.sgd_probe` against PyTorch's SGD and AdamW with the schedules of MoCo v3 and others."""

import dataclasses

import numpy as np
import pytest
import references as reference

from declip_jax.evals import sgd_probe
from declip_jax.evals.rows import Labelled, ProbeData
from declip_jax.evals.sgd_probe import ADAMW, SGD
from declip_jax.sharding import make_mesh

GOLDEN = reference.below(reference.load("probes"), "sgd/")
TRAIN, TEST = (Labelled(GOLDEN[f"X_{name}"], GOLDEN[f"y_{name}"]) for name in ("train", "test"))
ORDER = GOLDEN["order"].astype(np.int64)


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(4, 2)


def top1(scores, label):
  return float((scores.argmax(axis=1) == label).mean())


def train(mesh, recipe, rates):
  recipe = dataclasses.replace(recipe, epochs=6, batch_size=int(GOLDEN["batch_size"]))
  kernel = np.ascontiguousarray(GOLDEN["initial_kernel_out_in"].T)
  return sgd_probe.train_heads(TRAIN, ORDER, kernel, mesh, recipe, rates)


def test_heads_with_momentum_equal_pytorchs(mesh):
  heads = train(mesh, SGD, (0.01, 0.1, 1.0))  # the rates beside it change nothing
  np.testing.assert_allclose(heads.kernel[1].T, GOLDEN["sgd/f64/kernel_out_in"][-1], atol=1e-5)
  np.testing.assert_allclose(heads.bias[1], GOLDEN["sgd/f64/bias"][-1], atol=1e-5)
  np.testing.assert_allclose(heads.loss[:, 1], GOLDEN["sgd/f64/mean_loss"], atol=1e-5)
  scores = TEST.features @ np.asarray(heads.kernel[1]) + np.asarray(heads.bias[1])
  assert top1(scores, TEST.label) == pytest.approx(GOLDEN["sgd/f64/test_top1"][-1])


def test_heads_with_adamw_equal_pytorchs(mesh):
  heads = train(mesh, dataclasses.replace(ADAMW, weight_decay=float(GOLDEN["adamw/weight_decay"])), (0.1,))
  expected = GOLDEN["adamw/kernel_out_in"]
  np.testing.assert_allclose(heads.kernel[0].T, expected, atol=1e-5 * np.abs(expected).max())
  np.testing.assert_allclose(heads.bias[0], GOLDEN["adamw/bias"], atol=1e-5)
  unit = TEST.features / np.linalg.norm(TEST.features, axis=1, keepdims=True)
  scores = unit @ np.asarray(heads.kernel[0]) + np.asarray(heads.bias[0])
  assert top1(scores, TEST.label) == pytest.approx(float(GOLDEN["adamw/test_top1"]))


def test_the_rate_is_chosen_on_the_validation_split(mesh):
  recipe = dataclasses.replace(SGD, epochs=3, batch_size=100)  # the last batch has 24 rows
  val = Labelled(TEST.features[:100], TEST.label[:100])
  rest = Labelled(TEST.features[100:], TEST.label[100:])
  data = ProbeData(TRAIN, rest, top1, 7, mesh, val)
  found = sgd_probe.sgd_probe(data, recipe=recipe, rates=(1e-4, 0.3, 1e38))
  assert sorted(found.val_scores) == [1e-4, 0.3]  # the head with the last rate diverged
  assert found.rate == 0.3
  assert found.val_scores[0.3] > 0.5 > found.val_scores[1e-4]
  assert found.loss.shape == (3,)
  assert (found.scores[:, 6] == -np.inf).all()  # no training data
  assert top1(found.scores, found.label) > 0.5
  with pytest.raises(ValueError, match=r"diverged with each of the learning rates 1e\+38"):
    sgd_probe.sgd_probe(data, recipe=recipe, rates=(1e38,) * 3)
  with pytest.raises(ValueError, match="val: no rows"):
    sgd_probe.sgd_probe(dataclasses.replace(data, val=None), recipe=recipe)
