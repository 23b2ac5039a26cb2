"""Interpolation between two models of the same architecture in weight space."""

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def interpolate(start: Tree, end: Tree, share: float) -> Tree:
  """`1 - share` times the arrays of `start` plus `share` times those of `end`, which keep their types.

  WiSE-FT (Wortsman et al. 2022, section 3) interpolates from a zero-shot model, whose classifier consists of the
  embeddings of class names, to that model after fine-tuning, and recommends the middle.

  Args:
    start, end: trees of arrays with the same structure and shapes.
    share: 0 gives `start` and 1 gives `end`, exactly.

  Raises:
    ValueError: the trees have other structures or shapes; the message names the first array that differs.
  """
  before, after = (
    {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in jax.tree.leaves_with_path(t)}
    for t in (start, end)
  )
  if differing := sorted(set(before.items()) ^ set(after.items())):
    path = differing[0][0]
    found = " and ".join(str(shapes[path]) if path in shapes else "absent" for shapes in (before, after))
    raise ValueError(f"the weights differ in {path}, {found}: they are not of the same model")
  if share in (0, 1):
    return end if share else start
  return jax.tree.map(lambda a, b: _between(a, b, share), start, end)


def _between(start: Any, end: Any, share: float) -> Any:
  """In the type of `start`; integers, such as a number of steps, cannot be mixed and are those of `end`."""
  if not jnp.issubdtype(start.dtype, jnp.floating):
    return end
  return ((1 - share) * start + share * end).astype(start.dtype)
