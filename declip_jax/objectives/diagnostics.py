"""Early signs of a collapsed or broken run, computed from the outputs of a step. They are not part of any loss.

| `diagnostics/<branch>/<what>` | healthy | collapsed |
|---|---|---|
| `deviation` of rows | about 1, its upper bound | 0 |
| `rank` of rows | a large share of their dimension | 1 |
| `uniformity` of embeddings | towards -4 | 0 |
| `alignment` of pairs, in [0, 4] | falls from about 2 while uniformity stays low | anything |
| `accuracy` of pairs | rises to 1 | 1 / rows |
| `explained_variance` of hidden patches, at most 1 | above 0 | 0 or less |
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from declip_jax.objectives.contrastive import Metrics, accuracy
from declip_jax.types import Outputs
from declip_jax.unit_norm import unit_norm

MOST_ROWS = 4096  # largest number of rows whose pairs are all compared: a matrix of 64 MiB over all devices
_ROUNDING = 1e-12  # total variance of unit rows below which float32 cannot distinguish them from equal ones


def diagnose(outputs: Outputs, kinds: Mapping[str, str], has_pooled: bool = True) -> Metrics:
  """All diagnostics of `outputs`, as float32 scalars without gradient.

  Where both `image` and `text` exist, there is also `image_text/alignment` of the first image view with the first text
  view; and for the sigmoid loss, which, unlike the other contrastive losses, ranks nothing, the accuracy of finding one
  by the other, in the batch or in `MOST_ROWS` of it.

  Args:
    outputs: outputs of the global batch, sharded or not.
    kinds: the kind of each output, one of `KINDS`; outputs of no kind have no diagnostics.
    has_pooled: False omits those of images and texts as a whole, for objectives such as FILIP's that train only tokens.
  """
  outputs = jax.lax.stop_gradient(outputs)
  found = {}
  for name, kind in kinds.items():
    if name in outputs and (has_pooled or kind != "pooled"):
      found |= KINDS[kind](outputs, name)
  if has_pooled and "image" in outputs and "text" in outputs:
    found |= _pairs(outputs)
  return {f"diagnostics/{name}": value for name, value in found.items()}


def _embeddings(outputs: Outputs, name: str) -> Metrics:
  return _variation(name, unit_norm(getattr(outputs, name)))


def _pooled(outputs: Outputs, name: str) -> Metrics:
  rows = unit_norm(getattr(outputs, name))
  return {**_variation(name, rows), f"{name}/uniformity": _uniformity(rows[0])}


def _variation(name: str, rows: Float[Array, "v b p"]) -> Metrics:
  return {f"{name}/deviation": _deviation(rows, axis=1), f"{name}/rank": _effective_rank(rows)}


def _tokens(outputs: Outputs, name: str) -> Metrics:
  mask = name.replace("_tokens", "_valid")
  valid = getattr(outputs, mask)[..., None] if mask in outputs else None
  return {f"{name}/deviation": _deviation(unit_norm(getattr(outputs, name)), axis=(0, 1), where=valid)}


def _patches(outputs: Outputs, name: str) -> Metrics:
  branch = name.removesuffix("_prediction")
  target = getattr(outputs, f"{branch}_target")
  return {f"{branch}/explained_variance": _explained_variance(getattr(outputs, name), target)}


def _pairs(outputs: Outputs) -> Metrics:
  image, text = outputs.image[0], outputs.text[0]
  found = {"image_text/alignment": _alignment(image, text)}
  if "bias" in outputs:
    logits = jnp.einsum("bd,nd->bn", _some(image), _some(text), precision=jax.lax.Precision.HIGHEST)
    found["image_text/image_to_text_accuracy"] = accuracy(logits)
    found["image_text/text_to_image_accuracy"] = accuracy(logits.T)
  return found


# The kinds of outputs, as heads declare them: `[v b p]` embeddings of self-supervision, of whole images or texts in the
# joint space (which also have `uniformity` of the first view), `[b n e]` tokens, whose padding `<modality>_valid`
# masks, and `[b m e]` predictions of patches, `<branch>_prediction` of `<branch>_target`.
KINDS: dict[str, Callable[[Outputs, str], Metrics]] = {
  "embeddings": _embeddings,
  "pooled": _pooled,
  "tokens": _tokens,
  "patches": _patches,
}


def _deviation(
  rows: Float[Array, "*rows p"], axis: int | tuple[int, ...], where: Bool[Array, "*rows 1"] | None = None
) -> Float[Array, ""]:
  """Standard deviation of unit rows over `axis`, averaged over everything else, times sqrt(p).

  SimSiam (Chen and He 2021, section 4.1), which plots it without the factor: isotropic rows have 1 / sqrt(p).
  """
  return jnp.std(rows, axis=axis, where=where).mean() * rows.shape[-1] ** 0.5


def _effective_rank(rows: Float[Array, "v b p"]) -> Float[Array, ""]:
  """`(tr C)^2 / ||C||_F^2` of the covariance `C` of the unit rows of a view, averaged over views.

  This participation ratio is 1 if the rows vary in one direction only, and `p` if they vary equally in all. It needs no
  eigenvalues. It is a lower bound of the effective rank of Roy and Vetterli (2007), the exponential of the Shannon
  entropy of the eigenvalues divided by their sum: the ratio is the exponential of their Renyi entropy of order 2, which
  is never larger. A batch limits it: `b` isotropic rows have about `b p / (b + p)`.

  Equal rows have rank 1. Below a deviation of 1e-6 the variance is mostly rounding, so there the result tends to 1.
  """
  centred = rows - rows.mean(axis=1, keepdims=True)
  covariance = jnp.einsum("vbp,vbq->vpq", centred, centred, precision=jax.lax.Precision.HIGHEST) / rows.shape[1]
  total = jnp.einsum("vpp->v", covariance)
  squares = jnp.sum(covariance**2, axis=(1, 2))
  return jnp.mean((total**2 + _ROUNDING**2) / (squares + _ROUNDING**2))


def _some(rows: Float[Array, "b d"]) -> Float[Array, "n d"]:
  """All rows; if there are more than `MOST_ROWS`, every second one, or every third, and so on.

  The first rows would all be on a few of the devices; these are spread over all devices and are not moved.
  """
  return rows[:: -(-rows.shape[0] // MOST_ROWS)]


def _alignment(x: Float[Array, "b d"], y: Float[Array, "b d"]) -> Float[Array, ""]:
  """Mean squared distance of the embeddings of positive pairs (Wang and Isola 2020, section 4.1, with alpha = 2)."""
  return jnp.mean(jnp.sum((x - y) ** 2, axis=-1))


def _uniformity(rows: Float[Array, "b d"]) -> Float[Array, ""]:
  """`log mean exp(-2 distance^2)` over the pairs of distinct unit rows (Wang and Isola 2020, section 4.1, with t = 2).

  Computed from `_some` of the rows. For rows spread over a sphere of many dimensions it approaches -4, since any two
  have a distance of about sqrt(2).
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
