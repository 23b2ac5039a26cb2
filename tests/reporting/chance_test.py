"""Tests of the values of random answers."""

import pytest
from scipy.stats import hypergeom

from declip_jax.reporting.chance import recalls_at_chance


@pytest.mark.parametrize(
  ("rank", "images", "texts"), [(1, 100, 100), (10, 1000, 5000), (5, 30, 180), (10, 4, 20), (10, 2, 12), (10, 3, 9)]
)
def test_recalls_are_the_chance_to_draw_a_right_one(rank: int, images: int, texts: int) -> None:
  right, first = texts // images, min(rank, texts)
  image_to_text = 1 - hypergeom(texts, right, first).pmf(0)
  text_to_image = 1 - hypergeom(images, 1, min(rank, images)).pmf(0)
  assert recalls_at_chance(rank, images, texts) == pytest.approx((image_to_text, text_to_image))
