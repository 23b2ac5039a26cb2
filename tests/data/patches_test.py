"""Tests for data/patches.py: blocks as in BeiT (Bao et al. 2022, algorithm 1), and as many patches as promised."""

import numpy as np
import pytest
from tiers import slow_except

from declip_jax.data import patches

GRIDS = (2, 3, 4, 5, 7, 8, 12, 14, 16)


def draw(grid, count, seed):
  return patches.block_mask(grid, count, np.random.default_rng(seed))


def pictures(grid, count, number):
  """Masks of seeds 0, 1, ... as bool `[number grid grid]`."""
  masks = np.zeros((number, grid * grid), bool)
  for seed in range(number):
    masks[seed, draw(grid, count, seed)] = True
  return masks.reshape(number, grid, grid)


def adjacent_pairs(masks):
  """The number of hidden patches with a hidden one to the right or below, per mask."""
  return ((masks[:, :, 1:] & masks[:, :, :-1]).sum() + (masks[:, 1:] & masks[:, :-1]).sum()) / len(masks)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("share", [0.05, 0.25, 0.4, 0.5, 0.75, 0.95])
def test_hides_exactly_that_share_on_any_grid(grid, share):
  count = min(max(round(share * grid * grid), 1), grid * grid - 1)
  if count == round(share * grid * grid):
    assert patches.num_hidden(grid, share) == count
  for seed in range(20):
    positions = draw(grid, count, seed)
    assert positions.dtype == np.int32
    assert positions.shape == (count,)
    assert (np.diff(positions) > 0).all()  # ascending, none twice
    assert 0 <= positions[0] <= positions[-1] < grid * grid


def test_counts_as_the_paper_does():
  assert patches.num_hidden(14, 0.4) == 78
  assert patches.num_hidden(7, 0.4) == 20


def test_depends_on_the_generator_only():
  np.testing.assert_array_equal(draw(14, 78, 3), draw(14, 78, 3))
  assert len({draw(14, 78, seed).tobytes() for seed in range(50)}) == 50


@pytest.mark.parametrize("grid", [7, 14, 16])
def test_hidden_patches_touch_more_than_scattered_ones(grid):
  count = patches.num_hidden(grid, 0.4)
  rng = np.random.default_rng(0)
  scattered = np.zeros((200, grid * grid), bool)
  for mask in scattered:
    mask[rng.choice(grid * grid, count, replace=False)] = True
  blocks, chance = (adjacent_pairs(masks) for masks in (pictures(grid, count, 200), scattered.reshape(-1, grid, grid)))
  assert blocks > 1.6 * chance


@pytest.mark.parametrize("grid", slow_except((7,), (4, 7, 14)))
def test_no_side_is_hidden_more_often_than_another(grid):
  often = pictures(grid, patches.num_hidden(grid, 0.4), 3000).mean(axis=0)
  for mirrored in (often[::-1], often[:, ::-1], often.T):
    np.testing.assert_allclose(often, mirrored, atol=0.055)  # about 4 standard errors of a difference


def test_positions_are_hidden_as_often_as_in_the_released_code():
  """Its shares, from 3,000 masks of a plain loop over that rule: few blocks reach the border, and fewer a corner."""
  masks = pictures(14, 78, 3000)
  golden = {(0, 0): 0.05, (0, 6): 0.21, (2, 2): 0.32, (3, 5): 0.60, (6, 6): 0.75}
  for place, share in golden.items():
    assert masks[:, *place].mean() == pytest.approx(share, abs=0.05)
  assert adjacent_pairs(masks) == pytest.approx(130.8, rel=0.03)


@pytest.mark.parametrize(("grid", "least"), [(14, 16), (16, 16), (7, 4)])
def test_the_smallest_block_is_scaled_with_the_grid(grid, least):
  """Two patches belong to one block of the smallest size, and may be anywhere within it."""
  spans = []
  for mask in pictures(grid, 2, 1000):
    rows, columns = np.nonzero(mask)
    spans.append((np.ptp(rows) + 1, np.ptp(columns) + 1))
  spans = np.array(spans)
  sides = [(round((least * a) ** 0.5), round((least / a) ** 0.5)) for a in np.geomspace(0.3, 1 / 0.3, 1000)]
  assert all(any(h <= height and w <= width for height, width in set(sides)) for h, w in spans)
  assert tuple(spans.max(axis=0)) == tuple(np.max(sides, axis=0))


@pytest.mark.parametrize(("grid", "share", "named"), [(0, 0.4, "patch_grid=0"), (1, 0.4, "patch_grid=1")])
def test_rejects_an_image_without_patches(grid, share, named):
  with pytest.raises(ValueError, match=f"{named}: .*at least 2 x 2 patches"):
    patches.num_hidden(grid, share)


@pytest.mark.parametrize("share", [-0.1, 0.0, 0.1, 0.9, 1.0])
def test_rejects_a_share_that_hides_nothing_or_all(share):
  with pytest.raises(ValueError, match=rf"config.data.patch_share={share} hides .* of 4 patches.* 1 to 3"):
    patches.num_hidden(2, share)
