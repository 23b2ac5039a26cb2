"""Contrastive loss over image and text tokens: FILIP's late interaction, as FILIP and DeFILIP train with it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from declip_jax.objectives.blockwise import PLAIN, Method
from declip_jax.objectives.contrastive import Metrics, accuracy, cross_entropy
from declip_jax.types import Batch, Outputs

# Similarities of tokens that a device computes at once: an array of 64 MiB; a gradient stores four or five such arrays.
# Their precision is that of `jax_default_matmul_precision`, since they cost as much as a tower; FILIP itself compares
# in half precision.
BLOCK = 2**24


def filip(
  outputs: Outputs, batch: Batch, *, method: Method = PLAIN, top_k: int = 0, label_smoothing: float = 0.0
) -> tuple[Float[Array, ""], Metrics]:
  """Symmetric cross-entropy of `dense_scale` times the late interaction, with the accuracy of both directions.

  With `top_k=0` it is that of the paper (FILIP, Yao et al. 2022, section 3.1): every token of a query finds its most
  similar token in the candidate, and padding is excluded on both sides.

  `top_k` above 0 follows the code of DeCLIP's authors, whose released configs use 16. Only `top_k` tokens of each
  candidate can be found: those whose sum of similarities to all tokens of their own partner is largest; the selection
  has no gradient. Queries keep all their tokens. Padding counts like every other token: in the sums, among the
  candidates and in the mean over a text.

  Raises:
    ValueError: `top_k` is negative or larger than the number of tokens.
  """
  del batch
  image, text = outputs.image_tokens, outputs.text_tokens
  devices = method.mesh.size if method.mesh else 1  # over which the batch is split
  if top_k:
    most = min(image.shape[1], text.shape[1])
    if not 1 <= top_k <= most:
      raise ValueError(
        f"config.objective.filip.top_k={top_k}: images have {image.shape[1]} tokens and texts {text.shape[1]}, so "
        f"choose 1 to {most}, or 0 to compare all"
      )
    image_to_text, text_to_image = selected_interaction(image, text, top_k, devices=devices)
  else:
    image_to_text, text_to_image = late_interaction(image, text, outputs.text_valid, devices=devices)
  logits = outputs.dense_scale * image_to_text, outputs.dense_scale * text_to_image
  loss = sum(cross_entropy(x, label_smoothing) for x in logits) / 2
  metrics = ("filip_image_to_text_accuracy", "filip_text_to_image_accuracy")
  return loss, {name: accuracy(x) for name, x in zip(metrics, logits, strict=True)}


def late_interaction(
  image_tokens: Float[Array, "b n e"],
  text_tokens: Float[Array, "b2 t e"],
  text_valid: Bool[Array, "b2 t"],
  *,
  devices: int = 1,
) -> tuple[Float[Array, "b b2"], Float[Array, "b2 b"]]:
  """Similarities of all images to all texts, and of all texts to all images: neither is the transpose of the other.

  Image to text: the mean over image tokens of the largest inner product with a valid token of the text. Text to image:
  the mean over valid text tokens of the largest inner product with an image token. For unit tokens both are at most 1.

  `b * n * b2 * t` products are computed, of which only `BLOCK` are in memory at once on each of the `devices` over
  which both batches are split; value and gradient do not depend on it.
  """

  def compare(tokens: Float[Array, "c t e"], valid: Bool[Array, "c t"]) -> tuple[Float[Array, "b c"], ...]:
    likeness = jnp.einsum("bne,cte->bnct", image_tokens, tokens)
    count = jnp.maximum(valid.sum(axis=-1), 1)
    image_to_text = _largest(jnp.where(valid[None, None], likeness, -jnp.inf), axis=3).mean(axis=1)
    text_to_image = jnp.where(valid[None], _largest(likeness, axis=1), 0).sum(axis=-1) / count[None]
    return image_to_text, text_to_image

  cost = image_tokens.shape[0] * image_tokens.shape[1] * text_tokens.shape[1]
  image_to_text, text_to_image = _in_blocks(compare, (text_tokens, text_valid), cost, devices)
  return image_to_text, text_to_image.T


def selected_interaction(
  image_tokens: Float[Array, "b n e"], text_tokens: Float[Array, "b t e"], top_k: int, *, devices: int = 1
) -> tuple[Float[Array, "b b"], Float[Array, "b b"]]:
  """Like `late_interaction` between the images and the texts of one batch, by the selection that `filip` describes."""
  image_to_text = _best_matches(image_tokens, _most_similar(text_tokens, image_tokens, top_k), devices)
  text_to_image = _best_matches(text_tokens, _most_similar(image_tokens, text_tokens, top_k), devices)
  return image_to_text, text_to_image


def _best_matches(query: Float[Array, "b n e"], candidate: Float[Array, "c k e"], devices: int) -> Float[Array, "b c"]:
  """The mean over query tokens of the largest inner product with a token of the candidate."""

  def compare(tokens: Float[Array, "c k e"]) -> tuple[Float[Array, "b c"]]:
    return (_largest(jnp.einsum("bne,cke->bnck", query, tokens), axis=3).mean(axis=1),)

  cost = query.shape[0] * query.shape[1] * candidate.shape[1]
  return _in_blocks(compare, (candidate,), cost, devices)[0]


def _largest(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
  """`x.max(axis)`, where the first of equal values gets the gradient, as in PyTorch; JAX divides it among them.

  The gradient is computed from the positions of the maxima. JAX would store `x` and compare it with the maxima again.
  """
  size = x.shape[axis]

  def forward(x: Array) -> tuple[Array, Array]:
    value = x.max(axis)
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return value, jnp.where(x == jnp.expand_dims(value, axis), place, size).min(axis)

  def backward(first: Array, gradient: Array) -> tuple[Array]:
    chosen = jax.nn.one_hot(first, size, axis=axis, dtype=bool)
    return (jnp.where(chosen, jnp.expand_dims(gradient, axis), 0),)

  largest = jax.custom_vjp(lambda x: x.max(axis))
  largest.defvjp(forward, backward)
  return largest(x)


def _most_similar(tokens: Float[Array, "b n e"], partner: Float[Array, "b t e"], k: int) -> Float[Array, "b k e"]:
  """The `k` tokens of each example with the largest sum of inner products with all tokens of its partner."""
  total = jnp.einsum("bne,be->bn", tokens, partner.sum(axis=1), precision=jax.lax.Precision.HIGHEST)
  _, index = jax.lax.top_k(jax.lax.stop_gradient(total), k)
  return jnp.take_along_axis(tokens, index[..., None], axis=1)


def _in_blocks(
  compare: Callable[..., tuple[Float[Array, "b c"], ...]],
  candidates: tuple[Array, ...],
  cost: int,
  devices: int,
) -> tuple[Float[Array, "b b2"], ...]:
  """`compare(*candidates)`, one block of candidates at a time, recomputed for the gradient.

  `cost` is the number of products per candidate. A block takes equally many candidates from each device, so that every
  device sends only its own share of a block.
  """
  count = candidates[0].shape[0]
  blocks = -(-count * cost // (BLOCK * devices))
  blocks = min(1 << (blocks - 1).bit_length(), max(count // devices, 1))  # a power of two divides most batches
  if blocks == 1:
    return compare(*candidates)
  size = devices * -(-count // (blocks * devices))

  def deal(x: Array) -> Array:
    x = jnp.pad(x, [(0, size * blocks - count)] + [(0, 0)] * (x.ndim - 1))
    return jnp.swapaxes(x.reshape(size, blocks, *x.shape[1:]), 0, 1)

  step = jax.checkpoint(lambda block: compare(*block), prevent_cse=False)
  found = jax.lax.map(step, tuple(deal(x) for x in candidates))
  return tuple(jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1)[:, :count] for x in found)
