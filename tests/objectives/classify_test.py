"""Tests of `declip_jax.objectives.classify`, against timm's losses (fixtures/beit_finetuning.npz)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from declip_jax.objectives.classify import classify
from declip_jax.types import Outputs

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "beit_finetuning.npz")
LOGITS, LABELS = jnp.asarray(GOLDEN["loss/logits"]), jnp.asarray(GOLDEN["mix/labels"], jnp.int32)


def test_the_loss_and_its_gradient_equal_timm() -> None:
  """With the targets of mixup by 0.3, and with smoothed labels alone."""
  mixed = {"label": LABELS, "partner_label": LABELS[::-1], "label_weight": jnp.full(len(LABELS), 0.3)}

  @jax.jit
  @jax.value_and_grad
  def loss(logits: jax.Array) -> jax.Array:
    return classify(Outputs(class_logits=logits[None]), mixed)[0]

  value, gradient = loss(LOGITS)
  np.testing.assert_allclose(value, GOLDEN["loss/soft_target"], rtol=1e-6)
  np.testing.assert_allclose(gradient, GOLDEN["loss/soft_target_grad"], rtol=1e-5, atol=1e-7)
  smoothed, _ = classify(Outputs(class_logits=LOGITS[None]), {"label": LABELS})
  np.testing.assert_allclose(smoothed, GOLDEN["loss/label_smoothing0.1"], rtol=1e-6)


def test_a_label_that_dominates_its_partner_is_the_right_answer() -> None:
  logits = jnp.array([[[3.0, 1.0, 0.0], [0.0, 2.0, 5.0]], [[0.0, 4.0, 1.0], [0.0, 2.0, 5.0]]])  # two views
  labels = jnp.array([0, 1])

  def accuracy(weight: float) -> float:
    batch = {"label": labels, "partner_label": jnp.array([1, 2]), "label_weight": jnp.full(2, weight)}
    return float(classify(Outputs(class_logits=logits), batch)[1]["class_accuracy"])

  assert accuracy(0.9) == 0.25  # of the first image, in the first view
  assert accuracy(0.1) == 0.75
  plain = classify(Outputs(class_logits=logits), {"label": labels}, label_smoothing=0.0)[0]
  np.testing.assert_allclose(plain, -jax.nn.log_softmax(logits)[:, jnp.arange(2), labels].mean(), rtol=1e-6)
