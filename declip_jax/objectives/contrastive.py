"""Image-text contrast: CLIP's symmetric InfoNCE, and DeCLIP's multi-view supervision across modalities."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from declip_jax.objectives.blockwise import PLAIN, Method, log_sums
from declip_jax.types import Batch, Outputs

Metrics = dict[str, Float[Array, ""]]


class Contrast(NamedTuple):
  """InfoNCE of each view of one kind with each view of another.

  Attributes:
    loss: mean over the batch, and over both directions.
    smoothing: the loss with uniform targets minus `loss`: what a label smoothing of 1 adds.
    row_accuracy, column_accuracy: fraction of queries whose most similar candidate is their own; zero for columns that
      are not queries.
  """

  loss: Float[Array, "v u"]
  smoothing: Float[Array, "v u"]
  row_accuracy: Float[Array, "v u"]
  column_accuracy: Float[Array, "v u"]

  def smoothed(self, label_smoothing: float) -> Float[Array, "v u"]:
    """The loss with this share of the target distributed evenly over all candidates, as in PyTorch."""
    return self.loss + label_smoothing * self.smoothing


def info_nce(
  rows: Float[Array, "v b d"],
  columns: Float[Array, "u b d"],
  scale: Float[Array, ""],
  *,
  method: Method = PLAIN,
  full_gradient: bool = True,
  symmetric: bool = True,
) -> Contrast:
  """Each row has to find the column with its own index, by `scale` times their inner product, and each column its row.

  CLIP (Radford et al. 2021, figure 3). The batch is the global one, and by default the gradient is that of the whole
  logit matrix, as in DeCLIP, and in open_clip with `gather_with_grad`. Unless `symmetric`, only rows are queries.

  With `full_gradient=False` the candidates of each query are constants: an image learns only as the query for its text,
  and a text only as the query for its image. SLIP's released code does this, because its gather has no gradient. The
  loss and its gradient with respect to `scale` do not change. The gradient with respect to the embeddings is about half
  as long, so every other term has twice the weight in comparison. (In open_clip's default, without `local_loss`, it is
  1 / n of the full gradient on n processes.)
  """
  constant = (lambda side: side) if full_gradient else jax.lax.stop_gradient
  queries, candidates = scale * rows, columns
  if not full_gradient:
    # Where columns are the queries, the rows, which contain the scale, are constants. This factor, whose value is 1,
    # gives the scale its gradient there.
    candidates = columns * (scale / jax.lax.stop_gradient(scale))
  found = log_sums(queries, candidates, method, full_gradient=full_gradient, columns=symmetric)
  sides = ((queries, constant(candidates)), (constant(queries), candidates))[: 1 + symmetric]
  own = jnp.arange(rows.shape[1])[None, None]
  losses, smoothings, accuracies = [], [], []
  for sums, (x, y) in zip(found, sides, strict=False):
    positive = jnp.einsum("vbd,ubd->vub", x, y, precision=jax.lax.Precision.HIGHEST)
    losses.append(jnp.mean(sums.log_sum - positive, axis=2))
    mean = jnp.einsum("vd,ud->vu", x.mean(axis=1), y.mean(axis=1), precision=jax.lax.Precision.HIGHEST)
    smoothings.append(positive.mean(axis=2) - mean)
    accuracies.append(jnp.mean(sums.best == own, axis=2))
  accuracies.append(jnp.zeros_like(accuracies[0]))
  return Contrast(sum(losses) / len(losses), sum(smoothings) / len(smoothings), *accuracies[:2])


def contrast_views(outputs: Outputs, method: Method = PLAIN, *, full_gradient: bool = True) -> Contrast:
  """`info_nce` of every image view with every text view."""
  return info_nce(outputs.image, outputs.text, outputs.scale, method=method, full_gradient=full_gradient)


def clip(
  outputs: Outputs,
  batch: Batch,
  *,
  method: Method = PLAIN,
  full_gradient: bool = True,
  label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
  """InfoNCE of the first image view and the first text view, with the accuracy of both directions in the batch."""
  del batch
  if "pairs" in outputs:
    pairs = outputs.pairs
  else:
    first = outputs.replace(image=outputs.image[:1], text=outputs.text[:1])
    pairs = contrast_views(first, method, full_gradient=full_gradient)
  metrics = {"image_to_text_accuracy": pairs.row_accuracy, "text_to_image_accuracy": pairs.column_accuracy}
  return pairs.smoothed(label_smoothing)[0, 0], {name: value[0, 0] for name, value in metrics.items()}


def multi_view(
  outputs: Outputs,
  batch: Batch,
  *,
  method: Method = PLAIN,
  full_gradient: bool = True,
  label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
  """Mean InfoNCE over all pairs of an image view and a text view except the first: three of DeCLIP's 2x2.

  DeCLIP (Li et al. 2022, section 3.2.2) gives the first pair to the CLIP term and the others to this one. The
  released YFCC15M configs average over all four pairs: their weight of 0.4 is 0.1 for `clip` and 0.3 here.

  Raises:
    ValueError: there is only one image view and one text view.
  """
  del batch
  if len(outputs.image) * len(outputs.text) == 1:
    raise ValueError("term 'mvs' needs Outputs.image or Outputs.text with a second view: choose another recipe")
  pairs = outputs.pairs if "pairs" in outputs else contrast_views(outputs, method, full_gradient=full_gradient)
  return pairs.smoothed(label_smoothing).ravel()[1:].mean(), {}


def cross_entropy(logits: Float[Array, "b b"], label_smoothing: float = 0.0) -> Float[Array, ""]:
  """Mean cross-entropy of rows that have to find the column with their own index, given the whole matrix.

  `label_smoothing` is the share of the target that is distributed evenly over all columns, as in PyTorch's
  `CrossEntropyLoss`.
  """
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(logits.shape[0])).mean()
  if label_smoothing:
    loss += label_smoothing * (jnp.trace(logits) / logits.shape[0] - logits.mean())
  return loss


def accuracy(logits: Float[Array, "b b"]) -> Float[Array, ""]:
  """Fraction of rows whose largest column is that of their own index."""
  return jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(logits.shape[0]))
