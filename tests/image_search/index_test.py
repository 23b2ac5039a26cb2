"""Exact search, compared with sorting all cosines."""

import numpy as np
import pytest

from declip_jax.image_search import index as index_lib
from declip_jax.image_search.index import ImageIndex

RNG = np.random.default_rng(0)
EMBEDDING = RNG.normal(size=(37, 5)).astype(np.float32)
EMBEDDING[7] = 0
READABLE = np.arange(37) != 12


def expected(embedding, query):
  """Numbers and cosines of all readable images, nearest first."""
  rows = embedding.astype(np.float64)
  cosine = rows @ query / np.maximum(np.linalg.norm(rows, axis=1), 1e-12)
  number = np.array(sorted(np.flatnonzero(READABLE), key=lambda row: -cosine[row]))
  return number, cosine[number]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block", [1, 8, 1024])
def test_pages_are_those_of_all_sorted_cosines(dtype, block, monkeypatch, tmp_path):
  monkeypatch.setattr(index_lib, "_BLOCK", block)
  wide = np.concatenate([np.ones((37, 3)), EMBEDDING], axis=1).astype(dtype)
  np.save(tmp_path / "rows.npy", wide)
  mapped = np.load(tmp_path / "rows.npy", "r")[:, 3:]  # pooled features are in front of the embeddings
  index = ImageIndex(mapped, READABLE)
  query = index.unit(4)
  number, cosine = expected(mapped, query)
  pages = [index.search(query, offset, 7) for offset in range(0, 42, 7)]
  np.testing.assert_array_equal(np.concatenate([page.number for page in pages]), number)
  np.testing.assert_allclose(np.concatenate([page.cosine for page in pages]), cosine, atol=1e-6)
  assert [len(page.number) for page in pages] == [7, 7, 7, 7, 7, 1]
  assert {page.total for page in pages} == {index.size} == {36}
  assert number[0] == 4
  assert 12 not in number
  assert not len(index.search(query, 10**11, 7).number)


def test_equally_near_images_are_in_the_order_of_the_source_on_every_page():
  index = ImageIndex(np.ones((50, 2), np.float32), np.ones(50, bool))
  found = [index.search(index.unit(0), offset, 9).number for offset in range(0, 50, 9)]
  np.testing.assert_array_equal(np.concatenate(found), np.arange(50))
