"""Supervised classification of images: cross-entropy with soft targets."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from declip_jax.objectives.contrastive import Metrics
from declip_jax.types import Batch, Outputs


def classify(outputs: Outputs, batch: Batch, *, label_smoothing: float = 0.1) -> tuple[Float[Array, ""], Metrics]:
  """Cross-entropy of the class logits with `soft_targets`, averaged over views and examples.

  The fine-tuning of BeiT (Bao et al. 2022), which SLIP uses. The metric is the share of examples whose largest logit is
  that of their most probable class.

  Args:
    outputs: `class_logits`.
    batch: `label`, and after mixup or CutMix `partner_label` and `label_weight`.
    label_smoothing: see `soft_targets`.
  """
  logits, labels = outputs.class_logits, batch["label"]
  partners, weights = batch.get("partner_label", labels), batch.get("label_weight", jnp.ones(labels.shape))
  targets = soft_targets(labels, partners, weights, logits.shape[-1], label_smoothing)
  loss = optax.softmax_cross_entropy(logits, targets[None]).mean()
  hits = logits.argmax(axis=-1) == targets.argmax(axis=-1)[None]
  return loss, {"class_accuracy": hits.mean(dtype=jnp.float32)}


def soft_targets(
  labels: Int[Array, "b"], partners: Int[Array, "b"], weights: Float[Array, "b"], classes: int, label_smoothing: float
) -> Float[Array, "b classes"]:
  """Class probabilities of mixed images, float32: smoothed labels, mixed with those of the partners, as in timm.

  Args:
    labels: classes of the images before mixing.
    partners: classes of the images that were mixed in.
    weights: weight of each image's own class.
    classes: number of classes.
    label_smoothing: share of the probability that is spread evenly over all classes, including the right one.
  """

  def smoothed(labels: Int[Array, "b"]) -> Float[Array, "b classes"]:
    return label_smoothing / classes + (1 - label_smoothing) * jax.nn.one_hot(labels, classes)

  return weights[:, None] * smoothed(labels) + (1 - weights[:, None]) * smoothed(partners)
