"""Tests of `declip_jax.objectives.masked_lm` against loops and against DeCLIP's loss."""

import jax
import numpy as np
import pytest
import references as reference

from declip_jax.objectives.masked_lm import masked_lm
from declip_jax.types import Outputs


def test_value_equals_declip():
  golden = reference.load("declip")
  logits, target = golden["declip/mlm_logits_selected"], golden["mlm_labels"][golden["mlm_labels"] != -100]
  batch = {"mlm_target": target[:, None], "mlm_weight": np.ones((len(target), 1), np.float32)}
  loss, _ = jax.jit(masked_lm)(Outputs(mlm_logits=logits[:, None]), batch)
  np.testing.assert_allclose(loss, golden["declip/mlm_loss"], atol=2.5e-6)


@pytest.mark.parametrize(("count", "slots", "words"), [(3, 4, 5), (8, 2, 11), (2, 7, 3)])
def test_value_and_accuracy_equal_loops(count, slots, words):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(count, slots, words)).astype(np.float32)
  target = rng.integers(0, words, size=(count, slots))
  weight = rng.integers(2, size=(count, slots)).astype(np.float32)
  weight[0, 0], weight[1] = 1, 0  # a caption without any
  target[0, 0] = logits[0, 0].argmax()
  chosen = [(b, k) for b in range(count) for k in range(slots) if weight[b, k]]
  expected = np.mean([np.log(np.exp(logits[at]).sum()) - logits[at][target[at]] for at in chosen])
  hits = np.mean([logits[at].argmax() == target[at] for at in chosen])
  loss, metrics = jax.jit(masked_lm)(Outputs(mlm_logits=logits), {"mlm_target": target, "mlm_weight": weight})
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["mlm_accuracy"], hits, rtol=1e-6)
  assert hits > 0


def test_padding_has_no_gradient_and_a_batch_without_masks_has_a_loss_of_zero():
  logits = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
  batch = {"mlm_target": np.zeros((2, 3), int), "mlm_weight": np.array([[1, 0, 0], [0, 0, 0]], np.float32)}
  step = jax.jit(jax.value_and_grad(lambda logits, batch: masked_lm(Outputs(mlm_logits=logits), batch)[0]))
  _, gradient = step(logits, batch)
  assert (np.abs(gradient).max(axis=-1) > 0).tolist() == [[True, False, False], [False, False, False]]
  value, gradient = step(logits, batch | {"mlm_weight": np.zeros((2, 3), np.float32)})
  assert value == 0
  np.testing.assert_array_equal(gradient, np.zeros_like(logits))
