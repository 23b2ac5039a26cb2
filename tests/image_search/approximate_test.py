"""Search by usearch, where it is installed, compared with exact search; without it, search is exact."""

import sys

import numpy as np
import pytest

from declip_jax.extras import install_command
from declip_jax.image_search import approximate
from declip_jax.image_search.approximate import ApproximateIndex, make_index
from declip_jax.image_search.index import ImageIndex

RNG = np.random.default_rng(0)
EMBEDDING = (RNG.normal(size=(20, 16))[RNG.integers(0, 20, 2000)] + RNG.normal(size=(2000, 16))).astype(np.float32)
READABLE = np.arange(2000) % 50 != 3


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setattr(approximate, "EXACT", 1999)


def test_pages_are_those_of_exact_search(small, tmp_path, capsys):
  pytest.importorskip("usearch")
  exact = ImageIndex(EMBEDDING, READABLE)

  def check(index):
    assert isinstance(index, ApproximateIndex)
    for number in (0, 7, 1234):
      query = exact.unit(number)
      for offset in (0, 24, 600):  # the last one is exact
        ours, theirs = index.search(query, offset, 24), exact.search(query, offset, 24)
        assert len({*ours.number} & {*theirs.number}) >= 20  # a graph that several threads build misses a few
        np.testing.assert_allclose(ours.cosine, exact.cosines(query)[ours.number], atol=1e-3)
        assert READABLE[ours.number].all()
        assert ours.total == index.size == 1960

  check(make_index(EMBEDDING, READABLE, tmp_path))
  file = tmp_path / "images.usearch"
  before = file.stat().st_mtime_ns
  check(make_index(EMBEDDING.astype(np.float16), READABLE, tmp_path))  # read, not built
  assert file.stat().st_mtime_ns == before
  file.write_bytes(b"damaged" * 99)
  check(make_index(EMBEDDING, READABLE, tmp_path))
  assert str(file) in capsys.readouterr().err
  check(make_index(EMBEDDING, READABLE, tmp_path))
  check(make_index(EMBEDDING, READABLE))


def test_without_usearch_search_is_exact(small, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "usearch.index", None)
  assert type(make_index(EMBEDDING, READABLE)) is ImageIndex
  assert install_command("search") in capsys.readouterr().err
  monkeypatch.setattr(approximate, "EXACT", 2000)
  assert type(make_index(EMBEDDING, READABLE)) is ImageIndex
