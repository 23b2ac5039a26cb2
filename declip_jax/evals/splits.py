"""A validation split for data sets that have none."""

from jaxtyping import Int
import numpy as np

_PORTION = 5  # one of five images of a class
_SEED = 0
RULE = "per class, the last 20 % of numpy.random.default_rng(0).permutation, at least one"


def carve(
  label: Int[np.ndarray, "n"], group: Int[np.ndarray, "n"] | None = None, per_class: int | None = None
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "val"]]:
  """Divides a training set into a part to train on and one to choose hyperparameters on, see `RULE`.

  CLIP carved validation splits for two thirds of its data sets (Radford et al. 2021, A.3) and did not publish them.
  The generator is used class by class, in the order of the classes. A class with a single image, or group, is only
  trained on.

  Args:
    label: class of each image; an image without a class, -1, is in neither part.
    group: what must stay together, such as the frames of a track or video; whole groups are permuted and held out.
    per_class: images, or groups, of each class to hold out instead of 20 %, such as 50 for ImageNet.

  Returns:
    The rows of both parts, in increasing order.
  """
  rng, val = np.random.default_rng(_SEED), []
  for number in np.unique(label[label >= 0]):
    rows = np.flatnonzero(label == number)
    units, unit = np.unique(rows if group is None else group[rows], return_inverse=True)
    held = min(per_class or max(len(units) // _PORTION, 1), len(units) - 1)
    chosen = rng.permutation(len(units))[len(units) - held :]
    val.append(rows[np.isin(unit, chosen)])
  held_out = np.sort(np.concatenate([np.zeros(0, np.int64), *val]))
  return np.setdiff1d(np.flatnonzero(label >= 0), held_out), held_out
