"""Numbers that tell a collapsed or broken run early, from the outputs of a step. No term of any loss.

| `diagnostics/<branch>/<what>` | healthy | collapsed |
|---|---|---|
| `deviation` of rows | about 1, its upper bound | 0 |
| `rank` of rows | a good part of their dimension | 1 |
| `uniformity` of embeddings | towards -4 | 0 |
| `alignment` of pairs, in [0, 4] | falls from about 2 while uniformity stays low | anything |
| `accuracy` of pairs | rises to 1 | 1 / rows |
| `explained_variance` of hidden patches, at most 1 | above 0 | 0 or less |
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from declip_jax.objectives.contrastive import Metrics, accuracy
from declip_jax.types import Outputs
from declip_jax.unit_norm import unit_norm

MOST_ROWS = 4096  # at most so many are compared, all pairs: a matrix of 64 MiB over all devices
_ROUNDING = 1e-12  # total variance of unit rows below which float32 cannot tell them from equal ones


def measure(outputs: Outputs, pooled: bool = True) -> Metrics:
  """All diagnostics that the fields of `outputs` allow, as float32 scalars without gradient.

  - `simclr`, `simsiam_projection`, `momentum_prediction`, `momentum_target`: `deviation`, `rank`.
  - `image`, `text`: `deviation`, `rank`; and `uniformity` of the first view.
  - `image_text`: `alignment` of the first image view with the first text view; for the sigmoid loss, which unlike the
    other contrasts ranks nothing, also the `accuracy` of finding one by the other, in the batch or among some
    `MOST_ROWS` of it.
  - `image_tokens`, `text_tokens`: `deviation` over all tokens of all examples, without the padding of texts.
  - `mim`: `explained_variance`.

  Which names there are follows from which fields are None; not `pooled` leaves out what is of images and texts as a
  whole, for objectives such as FILIP's that only train their tokens. The batch is the global one, sharded or not.
  """
  outputs = jax.lax.stop_gradient(outputs if pooled else outputs.replace(image=None, text=None))
  found = {}
  for branch in ("simclr", "simsiam_projection", "momentum_prediction", "momentum_target", "image", "text"):
    if (rows := getattr(outputs, branch)) is not None:
      rows = unit_norm(rows)
      found[f"{branch}/deviation"] = _deviation(rows, axis=1)
      found[f"{branch}/rank"] = _effective_rank(rows)
      if branch in ("image", "text"):
        found[f"{branch}/uniformity"] = _uniformity(rows[0])
  if outputs.image is not None and outputs.text is not None:
    image, text = outputs.image[0], outputs.text[0]
    found["image_text/alignment"] = _alignment(image, text)
    if outputs.bias is not None:
      logits = jnp.einsum("bd,nd->bn", _some(image), _some(text), precision=jax.lax.Precision.HIGHEST)
      found["image_text/image_to_text_accuracy"] = accuracy(logits)
      found["image_text/text_to_image_accuracy"] = accuracy(logits.T)
  if outputs.image_tokens is not None:
    found["image_tokens/deviation"] = _deviation(unit_norm(outputs.image_tokens), axis=(0, 1))
  if outputs.text_tokens is not None and outputs.text_valid is not None:
    valid = outputs.text_valid[..., None]
    found["text_tokens/deviation"] = _deviation(unit_norm(outputs.text_tokens), axis=(0, 1), where=valid)
  if outputs.mim_prediction is not None and outputs.mim_target is not None:
    found["mim/explained_variance"] = _explained_variance(outputs.mim_prediction, outputs.mim_target)
  return {f"diagnostics/{name}": value for name, value in found.items()}


def _deviation(
  rows: Float[Array, "*rows p"], axis: int | tuple[int, ...], where: Bool[Array, "*rows 1"] | None = None
) -> Float[Array, ""]:
  """Standard deviation of unit rows over `axis`, averaged over everything else, times sqrt(p).

  SimSiam (Chen and He 2021, section 4.1), which plots it without the factor: isotropic rows have 1 / sqrt(p).
  """
  return jnp.std(rows, axis=axis, where=where).mean() * rows.shape[-1] ** 0.5


def _effective_rank(rows: Float[Array, "v b p"]) -> Float[Array, ""]:
  """`(tr C)^2 / ||C||_F^2` of the covariance `C` of the unit rows of a view, averaged over views.

  This participation ratio is the exponential of the Renyi entropy of order 2 of the eigenvalues of `C`, normalised to
  sum 1. The effective rank of Roy and Vetterli (2007) is that of the Shannon entropy, which is never smaller: ours is a
  lower bound of theirs for `C`, and so for the centred rows themselves, whose singular values are the square roots and
  hence more even. It needs no eigenvalues. A batch bounds it: `b` isotropic rows show about `b p / (b + p)`.

  Equal rows have rank 1. Below a deviation of 1e-6 the variance is rounding, which may point anywhere: it tends to 1.
  """
  centred = rows - rows.mean(axis=1, keepdims=True)
  covariance = jnp.einsum("vbp,vbq->vpq", centred, centred, precision=jax.lax.Precision.HIGHEST) / rows.shape[1]
  total = jnp.einsum("vpp->v", covariance)
  squares = jnp.sum(covariance**2, axis=(1, 2))
  return jnp.mean((total**2 + _ROUNDING**2) / (squares + _ROUNDING**2))


def _some(rows: Float[Array, "b d"]) -> Float[Array, "n d"]:
  """All rows, but of more than `MOST_ROWS` only every second, or every third, and so on.

  The first rows would all lie on a few of the devices; these stay where they are.
  """
  return rows[:: -(-rows.shape[0] // MOST_ROWS)]


def _alignment(x: Float[Array, "b d"], y: Float[Array, "b d"]) -> Float[Array, ""]:
  """Mean squared distance of the embeddings of positive pairs (Wang and Isola 2020, section 4.1, with alpha = 2)."""
  return jnp.mean(jnp.sum((x - y) ** 2, axis=-1))


def _uniformity(rows: Float[Array, "b d"]) -> Float[Array, ""]:
  """`log mean exp(-2 distance^2)` over the pairs of distinct unit rows (Wang and Isola 2020, section 4.1, with t = 2).

  Of `_some` of the rows. Those all over a sphere of many dimensions come near -4: two of them are sqrt(2) apart.
  """
  rows = _some(rows)
  count = rows.shape[0]
  cosine = jnp.einsum("bd,nd->bn", rows, rows, precision=jax.lax.Precision.HIGHEST)
  closeness = jnp.exp(4 * (cosine - 1))
  return jnp.log(jnp.sum(closeness, where=~jnp.eye(count, dtype=bool)) / (count * (count - 1)))


def _explained_variance(prediction: Float[Array, "b m e"], target: Float[Array, "b m e"]) -> Float[Array, ""]:
  """`1 - error / variance`, both squared and averaged over patches and their elements: 0 for the mean patch."""
  error = jnp.mean((prediction - target) ** 2)
  return 1 - error / jnp.maximum(jnp.var(target, axis=(0, 1)).mean(), 1e-12)
