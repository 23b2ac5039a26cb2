"""Masked image modelling: which patches of an image, cells of a square grid, are hidden."""

import math

from jaxtyping import Int32
import numpy as np

_LEAST = 16  # patches of a block ...
_LEAST_OF = 14 * 14  # ... in an image of this many patches, as with 224 pixels and patches of 16
_ASPECT = (0.3, 1 / 0.3)  # height / width of a block


def num_hidden(grid: int, share: float) -> int:
  """Returns `m`, the number of hidden patches of `[grid grid]`.

  Raises:
    ValueError: the grid is smaller than 2 x 2, or `share` hides no patch or all of them.
  """
  if grid < 2:
    raise ValueError(f"patch_grid={grid}: masked image modelling needs an image tower with at least 2 x 2 patches")
  cells = grid * grid
  count = round(share * cells)
  if not 0 < count < cells:
    raise ValueError(
      f"config.data.patch_share={share} hides {count} of {cells} patches: choose a share that hides 1 to {cells - 1}"
    )
  return count


def block_mask(grid: int, count: int, rng: np.random.Generator) -> Int32[np.ndarray, "m"]:
  """Draws the hidden patches in blocks, as BEiT does (Bao et al. 2022, algorithm 1).

  Blocks are placed at random, possibly overlapping, until `count` patches are hidden. The area of a block is uniform
  between 16 and the number of patches still missing, if that is larger; its aspect ratio is log-uniform between 0.3 and
  1 / 0.3, as in the released code. Only a random part of the last block is hidden, so that `count` is exact. On a grid
  smaller than 14 x 14 the minimum of 16 shrinks in proportion to the number of patches: 4 on 7 x 7.

  Difference from the released code: a block longer than the grid is clipped. There it is drawn again, and after ten
  blocks that do not fit, fewer patches are hidden.

  Args:
    grid: number of patches along each side.
    count: `m`, less than `grid * grid`; see `num_hidden`.
    rng: generator.

  Returns:
    The hidden patches in ascending order, numbered row by row from 0.
  """
  least = max(1, round(_LEAST * min(1.0, grid * grid / _LEAST_OF)))
  hidden = np.zeros((grid, grid), bool)
  # Any block may hide any remaining patch, so this ends; the last patches of a large share take some hundred blocks.
  while missing := count - np.count_nonzero(hidden):
    area = rng.uniform(least, max(least, missing))
    aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
    height, width = (min(grid, max(1, round(math.sqrt(x)))) for x in (area * aspect, area / aspect))
    top, left = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
    block = np.zeros_like(hidden)
    block[top : top + height, left : left + width] = True
    new = np.flatnonzero(block & ~hidden)
    hidden.flat[new if len(new) <= missing else rng.choice(new, missing, replace=False)] = True
  return np.flatnonzero(hidden).astype(np.int32)
