"""Files of `FlaxCLIPModel`."""

from pathlib import Path

import flax.serialization
from flax.traverse_util import unflatten_dict
import numpy as np


def flax_tree(tensors: dict[str, np.ndarray]) -> dict:
  """The parameters of `FlaxCLIPModel` for tensors of `CLIPModel`, by modeling_flax_clip.py of transformers 4.48."""
  found = {}
  for name, x in tensors.items():
    *above, leaf = name.split(".")
    if leaf == "weight":
      norm = "norm" in above[-1] or "layrnorm" in above[-1]
      leaf = "scale" if norm else "embedding" if above[-1].endswith("_embedding") and x.ndim == 2 else "kernel"
      if leaf == "kernel":
        x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
    found[*above, leaf] = np.ascontiguousarray(x)
  return unflatten_dict(found)


def write_flax(file: Path, tree: dict) -> None:
  """Writes parameters as transformers does."""
  file.write_bytes(flax.serialization.to_bytes(tree))
