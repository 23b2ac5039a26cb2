"""Image-text contrast: CLIP's symmetric InfoNCE, and DeCLIP's multi-view supervision across modalities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from declip_jax.types import Batch, Outputs

Metrics = dict[str, Float[Array, ""]]


def similarity(x: Float[Array, "b d"], y: Float[Array, "n d"]) -> Float[Array, "b n"]:
  """All inner products in full float32, which a TPU would otherwise compute from bfloat16 inputs."""
  return jnp.einsum("bd,nd->bn", x, y, precision=jax.lax.Precision.HIGHEST)


def info_nce(
  image: Float[Array, "b d"], text: Float[Array, "b d"], scale: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, "b b"]]:
  """Mean of the image-to-text and text-to-image cross-entropies, and the logits `[image, text]`.

  CLIP (Radford et al. 2021, figure 3). The batch is the global one, so the gradient is that of the whole logit
  matrix: DeCLIP's gather is the same, SLIP's released one drops the gradient of the gathered side.
  """
  logits = scale * similarity(image, text)
  target = jnp.arange(logits.shape[0])
  rows = optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()
  columns = optax.softmax_cross_entropy_with_integer_labels(logits.T, target).mean()
  return (rows + columns) / 2, logits


def clip(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
  """InfoNCE of the first image view and the first text view; also in-batch image-to-text accuracy."""
  del batch
  loss, logits = info_nce(outputs.image[0], outputs.text[0], outputs.scale)
  return loss, {"clip_accuracy": _diagonal_wins(logits)}


def multi_view(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
  """Mean InfoNCE over all pairs of an image view and a text view but the first: three of DeCLIP's 2x2.

  DeCLIP (Li et al. 2022, section 3.2.2) gives the first pair to the CLIP term and the others to this one. The
  released YFCC15M configs fold both into one mean over four pairs.

  Raises:
    ValueError: there is only one image view and one text view.
  """
  del batch
  images, texts = outputs.image.shape[0], outputs.text.shape[0]
  pairs = [(i, t) for i in range(images) for t in range(texts)][1:]
  if not pairs:
    raise ValueError("term 'mvs' needs Outputs.image or Outputs.text with a second view: choose another recipe")
  losses = [info_nce(outputs.image[i], outputs.text[t], outputs.scale)[0] for i, t in pairs]
  return sum(losses) / len(losses), {}


def _diagonal_wins(logits: Float[Array, "b b"]) -> Float[Array, ""]:
  return jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(logits.shape[0]))
